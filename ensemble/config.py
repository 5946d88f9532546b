"""What can be chosen about sampling and scoring; imports no torch."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import STRICT, UNHASHED_IF_DEFAULT
from experts.config import NoiseScheduleName
from router.config import AUTO, SelectionConfig

CANDIDATES = (
    SelectionConfig(name="sticky"),
    SelectionConfig(name="sticky_resample", t_switch=0.5),
    SelectionConfig(name="full_then_sticky", t_switch=0.5),
    SelectionConfig(name="full_then_sticky", t_switch=0.8),
    SelectionConfig(name="coupled_resample"),
    SelectionConfig(name="threshold_then_top1"),
    SelectionConfig(name="top_k", k=1),
    SelectionConfig(name="threshold"),
    SelectionConfig(name="full"),
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SelectionSearchConfig:
    """How the selection `auto` is turned into one with a name: a short trial of each candidate."""

    candidates: Annotated[tuple[SelectionConfig, ...], Field(min_length=1)] = CANDIDATES
    """What is tried; of equals the first is chosen."""
    num_samples: Annotated[int, Field(ge=16)] = 500
    """Images drawn with each candidate, from seeds that no score draws."""
    steps: Annotated[int, Field(ge=1)] = 10
    """Solver steps of each of them."""
    max_calls: Annotated[float, Field(ge=1)] = 1.25
    """Expert calls that the chosen one may make on average for one evaluation of a velocity; both branches of guidance
    may make as many each."""

    @model_validator(mode="after")
    def _has_rules(self) -> "SelectionSearchConfig":
        """The choice is among rules."""
        if any(candidate.name == AUTO for candidate in self.candidates):
            raise ValueError(
                "selection_search.candidates are what `auto` is chosen from, so `auto` is none: leave it out"
            )
        return self


Solver = Literal["euler", "heun", "flow_match_euler", "flow_match_heun"]
FeatureSpace = Literal["pixels", "random_conv", "efficientnet_lite0"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReflectionConfig:
    """Weak-to-strong reflection: what the ensemble is reflected against."""

    weak: Literal["expert", "folder"] = "expert"
    """`expert`: one expert of the ensemble itself. `folder`: the ensemble or the expert in `path`."""
    expert_id: Annotated[int, Field(ge=0)] = 0
    """Which expert is the weak one."""
    path: str = ""
    """Folder of a pipeline (with fewer experts, trained for less long) or of a single expert."""
    steps: Annotated[int, Field(ge=1)] = 5
    """How many of the first steps are reflected; the last step never is."""

    @model_validator(mode="after")
    def _has_a_weak_one(self) -> "ReflectionConfig":
        """A folder needs its path, an expert has none."""
        if (self.weak == "folder") != bool(self.path):
            raise ValueError(
                f"reflection.path names the folder of weak=folder and of nothing else; weak is {self.weak}, "
                f"path is {self.path!r}: give both, or neither"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SamplingConfig:
    """From noise to images."""

    solver: Solver = "heun"
    """The rule that integrates the velocity; `flow_match_*` are diffusers' schedulers."""
    steps: Annotated[int, Field(ge=1)] = 25
    """Solver steps; Heun calls the velocity twice a step."""
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    """uncond + scale * (cond - uncond); 1 means none and costs nothing."""
    selection: SelectionConfig = SelectionConfig()
    """Which experts speak."""
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Images drawn at once; an image does not depend on it."""
    device: str = "cpu"
    """Torch device of the sampling."""
    reflection: ReflectionConfig | None = field(default=None, metadata=UNHASHED_IF_DEFAULT)
    """Weak-to-strong reflection of the first steps; needs the solver `euler` or `heun`."""

    compile: bool = field(default=False, metadata=UNHASHED_IF_DEFAULT)
    """Whether networks go through `torch.compile` first, which takes half a minute and a C++ compiler on a CPU; quicker
    by a fifth as they are, by half where they compute in eight bits."""

    @model_validator(mode="after")
    def _can_reflect(self) -> "SamplingConfig":
        """diffusers' schedulers remember what came before, so nothing can be done between two of their steps."""
        if self.reflection is not None and self.solver.startswith("flow_match"):
            raise ValueError(f"reflection needs the solver euler or heun, not {self.solver}; change one of the two")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    """How samples are scored against held-out images."""

    num_samples: Annotated[int, Field(ge=16)] = 1000
    """Images drawn for every table row; never more than there are training images, which give the floor."""
    spaces: Annotated[tuple[FeatureSpace, ...], Field(min_length=1)] = ("pixels", "random_conv")
    """Feature spaces of the Fréchet distance, KID, precision and recall; a gain in one alone is not a gain."""
    components: Annotated[int, Field(ge=2)] = 64
    """Principal components of a space in which the Fréchet distance is taken; never more than half as many as
    there are held-out images or samples."""
    neighbours: Annotated[int, Field(ge=1)] = 3
    """k of precision and recall."""
    conditional: bool = False
    """Whether samples are drawn with the classes of the held-out images, or without a condition."""
    seed: int = 0
    """0 draws the seeds 0, 1, 2 …; another number draws none of those again."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExpertSamplesConfig:
    """How the experts are drawn from, to train a router without the data."""

    samples_per_expert: Annotated[int, Field(ge=1)] = 2048
    """Draws from an expert on average; each has its cluster's share of all of them."""
    steps: Annotated[int, Field(ge=2)] = 10
    """Heun steps of a draw."""
    noise_schedule: NoiseScheduleName = "rectified_flow"
    """The noise path of the ensemble, which the draws follow."""
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Latents drawn at once."""
    device: str = "cpu"
    """Torch device of the drawing."""
    seed: int = 0
    """Draws are functions of (seed, expert, row)."""


Quantile = Annotated[float, Field(gt=0, lt=1)]
Weighting = Literal["velocity", "likelihood"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AuditConfig:
    """How samples are compared with the training set."""

    quantiles: Annotated[tuple[Quantile, ...], Field(min_length=1)] = (0.01, 0.05)
    """A sample is near if it is nearer to the training set than this share of the held-out images."""
    suspects: Annotated[int, Field(ge=1)] = 8
    """Samples shown beside their nearest training images."""
    selection: SelectionConfig = SelectionConfig()
    """How the samples were drawn; a pinned selection tells which expert made which."""
    conditional: bool = False
    """Whether the samples were drawn with the classes of the held-out images."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ClassifierConfig:
    """How images are classified by denoising them."""

    images: Annotated[int, Field(ge=1)] = 256
    """Held-out images, as many from every cluster as it has."""
    noises_per_image: Annotated[int, Field(ge=1)] = 16
    """Values of t, each with a noise of its own, that an error is averaged over; the same for all classes."""
    weighting: Weighting = "velocity"
    """`velocity`: every t counts alike, as in Li et al. `likelihood`: as in the likelihood's bound."""
    batch_size: Annotated[int, Field(ge=1)] = 4096
    """Rows that go through a network at once."""
    seed: int = 0
    """Seed of t and noise."""
