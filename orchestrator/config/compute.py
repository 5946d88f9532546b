"""Configuration of where stages run: resources, islands, and limits and retries after failures."""

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import STRICT
from orchestrator.config.stage_kinds import ENGINE_KINDS, PARALLEL_KINDS

CONTROLLER = "controller"
"""Name of the controller's own place; stages there run on an embedded Ray cluster."""

Money = Annotated[float, Field(ge=0)]

StorageUrl = Annotated[str, Field(pattern=r"^(/|file://|s3://|gs://|gcs://|memory://)")]
"""A storage as an fsspec URL with an allowed scheme."""


def _expand_home(path: object) -> object:
    return str(Path(path).expanduser()) if isinstance(path, str) and path.startswith("~") else path


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ResourcesConfig:
    """Resources that one stage needs from one worker."""

    cpus: Annotated[int, Field(ge=1)] = 1
    """Number of CPUs, and of torch threads."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """Number of GPUs; fractions are allowed."""
    memory_gb: Annotated[float, Field(ge=0)] = 0.0
    """Free memory that the node must have, in GB; 0 requires none."""
    workers: Annotated[int, Field(ge=1)] = 1
    """Workers that train together inside one island (Ray Train, DDP), or divide the shards of the stage `latents`;
    with `data.engine=ray`, processes of the data's stages. Each gets the CPUs and GPUs above."""
    labels: tuple[Annotated[str, Field(pattern=r"^[^=\s]+=.+$")], ...] = ()
    """Labels of the nodes that may run it, as Ray selects them: `ray.io/accelerator-type=H100`,
    `ray.io/market-type=!spot`, `zone=in(a,b)`; on a running Ray cluster or on islands."""
    islands: tuple[str, ...] = ()
    """Names of islands that may run it; `controller` is one. Empty: trainings on any island, other stages there."""

    @property
    def label_selector(self) -> dict[str, str] | None:
        """Return the labels in the form of Ray's `label_selector`."""
        return dict(label.split("=", 1) for label in self.labels) or None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StagesConfig:
    """Resources of each kind of stage."""

    dataset: ResourcesConfig = ResourcesConfig()
    """Reading and resizing the images."""
    codec: ResourcesConfig = ResourcesConfig()
    """Fitting the latent space."""
    decoder: ResourcesConfig = ResourcesConfig()
    """Training the convolutional decoder of principal components."""
    latents: ResourcesConfig = ResourcesConfig()
    """Encoding the images, and their captions."""
    features: ResourcesConfig = ResourcesConfig()
    """Features for the clustering."""
    partition: ResourcesConfig = ResourcesConfig()
    """Clustering, and writing the clusters' shards."""
    reference: ResourcesConfig = ResourcesConfig()
    """Features of real images for the scores."""
    init: ResourcesConfig = ResourcesConfig()
    """Copying a pretrained checkpoint."""
    expert: ResourcesConfig = ResourcesConfig()
    """One expert's training."""
    expert_samples: ResourcesConfig = ResourcesConfig()
    """Sampling latents from the experts, for a router that is trained without data."""
    router: ResourcesConfig = ResourcesConfig()
    """The router's training."""
    monolith: ResourcesConfig = ResourcesConfig()
    """The baseline's training."""
    cluster_conditioned: ResourcesConfig = ResourcesConfig()
    """Training of the cluster-conditioned monolith."""
    distilled_monolith: ResourcesConfig = ResourcesConfig()
    """Distillation of the experts into one network."""
    ensemble: ResourcesConfig = ResourcesConfig()
    """Assembling trained models in one folder."""
    selection_search: ResourcesConfig = ResourcesConfig()
    """Comparing selections for `auto`."""
    distill: ResourcesConfig = ResourcesConfig()
    """Training few-step students of the experts."""
    accelerate: ResourcesConfig = ResourcesConfig()
    """Planning cache schedules, building drafts."""
    prune: ResourcesConfig = ResourcesConfig()
    """Removing parts of the experts, and finetuning the rest."""
    quantize: ResourcesConfig = ResourcesConfig()
    """Quantizing the ensemble's weights."""
    stitch: ResourcesConfig = ResourcesConfig()
    """Joining the compressed and the original ensemble."""
    adapter_images: ResourcesConfig = ResourcesConfig()
    """Encoding the images of `ddm finetune`."""
    adapter: ResourcesConfig = ResourcesConfig()
    """Training of one expert's adapter."""
    timing: ResourcesConfig = ResourcesConfig()
    """Measuring the CPU time per image."""
    score: ResourcesConfig = ResourcesConfig()
    """Sampling and scoring."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class IslandConfig:
    """A separate Ray cluster, reached by Ray's job submission API; islands do not communicate with each other."""

    address: Annotated[str, Field(pattern=r"^https?://[^\s]+$")]
    """URL of its dashboard, such as http://127.0.1.1:8265; https off loopback, since the token is sent there."""
    plain_http: bool = False
    """Whether the token may be sent unencrypted over a private network; a tunnel to loopback is better."""
    token_file: str
    """File with its token, readable only by its owner (mode 600); every island has its own token."""
    storage: Annotated[StorageUrl, BeforeValidator(_expand_home)]
    """Storage of its data and models, an fsspec URL that island and controller reach; `~` is the controller's home."""
    storage_options: dict[str, str] = Field(default_factory=dict)
    """Options of that file system, such as `endpoint_url`; secrets must come from its environment instead."""
    cpus: Annotated[int, Field(ge=1)] = 1
    """CPUs that stages may use at once."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that stages may use at once."""
    memory_gb: Annotated[float, Field(ge=0)] = 0.0
    """Memory that stages may use at once, in GB; 0 is unlimited."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources that every job requires, such as `{pool_spot: 1}`."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment of its jobs; no secrets, since Ray shows it to everyone who may list jobs."""
    price_per_hour: Money = 0.0
    """Price per hour of the whole island at full use, in the currency of your bill."""
    preemptible: bool = False
    """Whether its nodes may be preempted (spot)."""
    preemptions_per_hour: Annotated[float, Field(ge=0)] = 0.0
    """Expected preemptions per node and hour, for `ddm plan`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ComputeConfig:
    """Where stages run, and their limits and retries."""

    backend: Literal["inline", "ray", "islands", "slurm"] = "ray"
    """`inline`: one after the other in this process. `ray`: on the workers of one Ray cluster. `islands`: trainings on
    separate Ray clusters (`islands` below), all else in the controller's place. `slurm`: one Slurm job per stage, on a
    shared disk."""
    cpus: Annotated[int, Field(ge=1)] | None = None
    """CPUs of the embedded Ray cluster; empty uses all CPUs of this machine."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs of the embedded Ray cluster."""
    address: str | None = None
    """Address of a running Ray cluster; empty starts one on loopback that ends with the command."""
    islands: dict[str, IslandConfig] = Field(default_factory=dict)
    """The islands by name, for backend=islands."""
    slurm: dict[str, str | int] = Field(default_factory=dict)
    """Slurm parameters by submitit's names, such as `slurm_partition`; `cluster: local` runs jobs on this machine."""
    stages: StagesConfig = StagesConfig()
    """Resources by kind of stage."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often a stage is retried after its worker was lost or an operation failed. Preemptions do not count. A
    training that resumes from a later checkpoint than the time before gets all retries again."""
    backoff_s: Annotated[float, Field(ge=0)] = 1.0
    """Wait before the first retry, times a random factor from 0.5 to 1.5; it doubles each time, up to a minute."""
    timeout_s: Annotated[float, Field(gt=0)] | None = None
    """Longest time for one attempt of one stage, without the wait for a worker; empty is unlimited."""
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    """Longest time for an expert over all its attempts; after it the ensemble omits the expert. Empty is unlimited."""
    grace_s: Annotated[float, Field(ge=0)] = 20.0
    """Time for a stage to save its work after a stop request."""
    lease_s: Annotated[float, Field(gt=0)] = 180.0
    """Stages of an island count as lost after this time without a connection or heartbeat."""
    budget_cost: Annotated[float, Field(gt=0)] | None = None
    """What the run may cost on islands, in the currency of their prices, over all its attempts; it warns at 80 %, and
    at 100 % saves its work and stops. Empty is unlimited."""
    budget_hours: Annotated[float, Field(gt=0)] | None = None
    """Worker hours that all attempts together may take, likewise."""
    max_spot_preemptions: Annotated[int, Field(ge=0)] = 2
    """After this many losses on preemptible islands a stage moves to one that is not preemptible, if there is one."""

    @field_validator("slurm")
    @classmethod
    def _refuse_control_characters(cls, slurm: dict[str, str | int]) -> dict[str, str | int]:
        """Refuse values that could start a new line in the batch script, which a shell would execute."""
        for key, value in slurm.items():
            if any(not character.isprintable() for character in f"{key}{value}"):
                raise ValueError(
                    f"names and values of slurm parameters are printed into a batch script, so they have no control "
                    f"characters; got {key}={value!r}: remove them"
                )
        return slurm

    @property
    def cpus_here(self) -> int:
        """Return the number of CPUs that stages on this machine may use at once."""
        return self.cpus or len(os.sched_getaffinity(0))

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        """Check that the settings fit the backend."""
        if self.timeout_s is not None and self.backend == "inline":
            raise ValueError(
                f"timeout_s needs a backend with separate workers, such as ray; got timeout_s={self.timeout_s:g} with "
                "backend=inline, which runs in this process and cannot be interrupted"
            )
        if (self.backend == "islands") != bool(self.islands):
            raise ValueError(
                "backend=islands needs at least one island, and islands need backend=islands; "
                f"got backend={self.backend} and {len(self.islands)} island(s)"
            )
        parallel = sorted(kind for kind, resources in vars(self.stages).items() if resources.workers > 1)
        if set(parallel) - {*PARALLEL_KINDS, *ENGINE_KINDS} or (parallel and self.backend in ("inline", "slurm")):
            raise ValueError(
                f"several workers need one of {', '.join(PARALLEL_KINDS)}, and backend=ray or backend=islands; "
                f"got stages.{', '.join(parallel)} with backend={self.backend}"
            )
        labelled = sorted(kind for kind, resources in vars(self.stages).items() if resources.labels)
        if labelled and not (self.backend == "islands" or (self.backend == "ray" and self.address)):
            raise ValueError(
                "labels select nodes of a running Ray cluster (address) or of islands, and this run has none; "
                f"got stages.{', '.join(labelled)} with backend={self.backend}"
            )
        if self.budget_cost is not None and not any(island.price_per_hour for island in self.islands.values()):
            raise ValueError(
                f"budget_cost counts the prices of islands, and none has one; got budget_cost={self.budget_cost:g}: "
                "set islands.<name>.price_per_hour, or budget_hours instead"
            )
        if CONTROLLER in self.islands:
            raise ValueError(f"an island cannot be named {CONTROLLER!r}, the name of the controller's place; rename it")
        named = {name for kind in vars(self.stages).values() for name in kind.islands}
        if unknown := sorted(named - self.islands.keys() - {CONTROLLER}):
            raise ValueError(f"stages name unknown island(s) {', '.join(unknown)}; known: {', '.join(self.islands)}")
        return self
