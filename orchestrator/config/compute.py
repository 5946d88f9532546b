"""Where stages run: resources, islands, and what happens when something fails. Part of the run's configuration."""

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import STRICT

CONTROLLER = "controller"
"""The name of the place where the controller itself is; stages there run on an embedded Ray cluster."""

Money = Annotated[float, Field(ge=0)]

StorageUrl = Annotated[str, Field(pattern=r"^(/|file://|s3://|gs://|gcs://|memory://)")]
"""A storage as an fsspec URL of a scheme that is allowed."""


def _expanded(path: object) -> object:
    return str(Path(path).expanduser()) if isinstance(path, str) and path.startswith("~") else path


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ResourcesConfig:
    """What one stage asks of one worker."""

    cpus: Annotated[int, Field(ge=1)] = 1
    """CPUs, and so torch threads."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs, fractions allowed."""
    memory_gb: Annotated[float, Field(ge=0)] = 0.0
    """Memory that must be free on the node; 0 asks for nothing."""
    workers: Annotated[int, Field(ge=1)] = 1
    """Workers that train together inside one island (Ray Train, DDP); each gets the CPUs and GPUs above."""
    islands: tuple[str, ...] = ()
    """Islands that may run it, `home` among them; empty: trainings on any island, everything else at home."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StagesConfig:
    """What each kind of stage asks for."""

    dataset: ResourcesConfig = ResourcesConfig()
    """Reading and shrinking the images."""
    codec: ResourcesConfig = ResourcesConfig()
    """Fitting the latent space."""
    features: ResourcesConfig = ResourcesConfig()
    """Features for the clustering."""
    partition: ResourcesConfig = ResourcesConfig()
    """Clustering, and writing the clusters' shards."""
    reference: ResourcesConfig = ResourcesConfig()
    """Features of real images for the scores."""
    init: ResourcesConfig = ResourcesConfig()
    """Copying a checkpoint to start from."""
    expert: ResourcesConfig = ResourcesConfig()
    """One expert's training."""
    expert_samples: ResourcesConfig = ResourcesConfig()
    """Drawing latents from the experts, for a router that sees no data."""
    router: ResourcesConfig = ResourcesConfig()
    """The router's training."""
    monolith: ResourcesConfig = ResourcesConfig()
    """The baseline's training."""
    cluster_conditioned: ResourcesConfig = ResourcesConfig()
    """Training of the baseline that is told the cluster."""
    distilled_monolith: ResourcesConfig = ResourcesConfig()
    """Distillation of the experts into one network."""
    ensemble: ResourcesConfig = ResourcesConfig()
    """Putting trained models into one folder."""
    selection_search: ResourcesConfig = ResourcesConfig()
    """Trying selections for `auto`."""
    distill: ResourcesConfig = ResourcesConfig()
    """Training few-step students of the experts."""
    accelerate: ResourcesConfig = ResourcesConfig()
    """Planning caches, making drafts."""
    prune: ResourcesConfig = ResourcesConfig()
    """Taking parts out of the experts, and training what is left."""
    quantize: ResourcesConfig = ResourcesConfig()
    """Putting the ensemble's weights into few bits."""
    stitch: ResourcesConfig = ResourcesConfig()
    """Putting a smaller and the whole ensemble together."""
    timing: ResourcesConfig = ResourcesConfig()
    """Measuring the processor time of an image."""
    score: ResourcesConfig = ResourcesConfig()
    """Sampling and scoring."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class IslandConfig:
    """A Ray cluster of its own, reached by Ray's job submission API; islands never talk to each other."""

    address: Annotated[str, Field(pattern=r"^https?://[^\s]+$")]
    """Its dashboard, such as http://127.0.1.1:8265; plain http only on loopback or through a tunnel."""
    token_file: str
    """File with its token, readable by its owner alone (mode 600); every island has a token of its own."""
    storage: Annotated[StorageUrl, BeforeValidator(_expanded)]
    """Where its data and models lie, as an fsspec URL that island and controller both reach; `~` is our home."""
    storage_options: dict[str, str] = Field(default_factory=dict)
    """Options of that file system, such as `endpoint_url`; never secrets: those come from its own environment."""
    cpus: Annotated[int, Field(ge=1)] = 1
    """CPUs that stages may use at once."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that stages may use at once."""
    memory_gb: Annotated[float, Field(ge=0)] = 0.0
    """Memory that stages may use at once; 0 is not counted."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Ray's custom resources that every job asks for, such as `{pool_spot: 1}`."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment of its jobs; never secrets, since Ray shows it to whoever may list jobs."""
    price_per_hour: Money = 0.0
    """Price of the whole island at full use, in the currency of your bill."""
    preemptible: bool = False
    """Whether its nodes may vanish (spot)."""
    preemptions_per_hour: Annotated[float, Field(ge=0)] = 0.0
    """How often a node of it is lost, for `ddm plan`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ComputeConfig:
    """Where stages run, and what happens when they fail."""

    backend: Literal["inline", "ray", "islands", "slurm"] = "ray"
    """`inline`: one after the other in this process. `ray`: on the workers of one Ray cluster. `islands`: trainings on
    Ray clusters of their own (`islands` below), the rest at home. `slurm`: each stage a Slurm job on a shared disk."""
    cpus: Annotated[int, Field(ge=1)] | None = None
    """CPUs of the embedded Ray cluster; all of this machine when empty."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs of the embedded Ray cluster."""
    address: str | None = None
    """Address of a running Ray cluster; empty starts one on loopback that ends with the command."""
    islands: dict[str, IslandConfig] = Field(default_factory=dict)
    """The islands by name, for backend=islands."""
    slurm: dict[str, str | int] = Field(default_factory=dict)
    """Parameters for Slurm by submitit's names, such as `slurm_partition`; `cluster: local` runs them here."""
    stages: StagesConfig = StagesConfig()
    """Resources by kind of stage."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often a stage is started again after its worker was lost or an operation failed; a preemption costs none,
    and a training that goes on from a later checkpoint than the last time has all of them again."""
    backoff_s: Annotated[float, Field(ge=0)] = 1.0
    """Wait before the first retry, give or take half; it doubles each time, up to a minute."""
    timeout_s: Annotated[float, Field(gt=0)] | None = None
    """Longest time for one attempt of one stage, waiting for a worker left out; empty is unlimited."""
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    """Longest time for an expert over all its attempts; the ensemble then goes on without it. Empty waits for ever."""
    grace_s: Annotated[float, Field(ge=0)] = 20.0
    """How long a stage may take to save its work when it is asked to stop."""
    lease_s: Annotated[float, Field(gt=0)] = 180.0
    """An island that cannot be reached and shows no sign of life for so long has lost its stages."""
    max_spot_preemptions: Annotated[int, Field(ge=0)] = 2
    """After so many losses on preemptible islands a stage goes to one that is not preemptible, if there is any."""

    @property
    def cpus_here(self) -> int:
        """CPUs that stages on this machine may use at once."""
        return self.cpus or len(os.sched_getaffinity(0))

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Check that what is asked for belongs to the backend."""
        if self.timeout_s is not None and self.backend == "inline":
            raise ValueError(
                f"timeout_s={self.timeout_s:g} needs backend=ray: inline runs in this process and cannot be interrupted"
            )
        if (self.backend == "islands") != bool(self.islands):
            raise ValueError(
                f"backend={self.backend} and {len(self.islands)} island(s): backend=islands needs at least one, and "
                "islands need backend=islands"
            )
        shared = sorted(kind for kind, asked in vars(self.stages).items() if asked.workers > 1)
        if set(shared) - {"expert", "router", "monolith", "cluster_conditioned", "distilled_monolith"} or (
            shared and self.backend in ("inline", "slurm")
        ):
            raise ValueError(
                f"stages.{', '.join(shared)} ask for several workers with backend={self.backend}: only trainings "
                "(expert, router, monolith, told, student) can have them, and only with backend=ray or backend=islands"
            )
        if CONTROLLER in self.islands:
            raise ValueError(f"an island cannot be called {CONTROLLER!r}: that is where the controller is")
        named = {name for kind in vars(self.stages).values() for name in kind.islands}
        if unknown := sorted(named - self.islands.keys() - {CONTROLLER}):
            raise ValueError(f"stages ask for unknown island(s) {', '.join(unknown)}; known: {', '.join(self.islands)}")
        return self
