"""Configuration of sampling, scoring and analyses; imports no torch."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import STRICT, UNHASHED_IF_DEFAULT
from ddm_core.seeds import Seed
from experts.config import NoiseScheduleName
from router.config import AUTO, SelectionConfig

MIN_HELD_OUT = 16
"""Fewest held-out images for which the scores are meaningful."""

TRAJECTORIES = "trajectories.safetensors"
"""File of a score with the previews and the gates of a few trajectories."""

TRAJECTORY_SEEDS, SAMPLES_PER_TRAJECTORY = 8, 16
"""Samples whose trajectories a score keeps, at most, and samples for each of them at least."""


def count_repeats(num_samples: int) -> int:
    """Return the number of samples that a score draws twice, the second time to keep their trajectories."""
    return min(TRAJECTORY_SEEDS, max(1, num_samples // SAMPLES_PER_TRAJECTORY))


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
    """Search of the selection `auto`: a short trial of each candidate."""

    candidates: Annotated[tuple[SelectionConfig, ...], Field(min_length=1)] = CANDIDATES
    """Selections to try; the first of equals wins."""
    num_samples: Annotated[int, Field(ge=16)] = 500
    """Images per candidate, from seeds that no score uses."""
    steps: Annotated[int, Field(ge=1)] = 10
    """Solver steps per image."""
    max_calls: Annotated[float, Field(ge=1)] = 1.25
    """Most expert calls per velocity evaluation, on average; the limit holds for each branch of guidance."""

    @model_validator(mode="after")
    def _has_rules(self) -> "SelectionSearchConfig":
        """Raise if a candidate is `auto` itself."""
        if any(candidate.name == AUTO for candidate in self.candidates):
            raise ValueError(
                "selection_search.candidates must not contain `auto`, which is the search itself; remove it"
            )
        return self


Solver = Literal["euler", "heun", "flow_match_euler", "flow_match_heun"]
FeatureSpace = Literal["pixels", "random_conv", "efficientnet_lite0"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReflectionConfig:
    """Weak-to-strong reflection: the weak ensemble and the reflected steps."""

    weak: Literal["early", "monolith", "expert", "folder"] = "early"
    """`early`: the earlier checkpoint of each sample's own expert (`expert.training.early_checkpoint`). `monolith`:
    that of the run. `expert`: one expert of the ensemble. `folder`: the ensemble or the expert in `path`."""
    expert_id: Annotated[int, Field(ge=0)] = 0
    """Id of the weak expert."""
    path: str = ""
    """Folder of a pipeline (with fewer experts, trained for less long) or of a single expert."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Number of reflected steps, from the first; empty reflects all but the last, which never is."""

    @model_validator(mode="after")
    def _check_path(self) -> "ReflectionConfig":
        """Raise if a folder has no path, or an expert has one."""
        if (self.weak == "folder") != bool(self.path):
            raise ValueError(
                f"reflection.path is the folder of weak=folder and of no other value; weak is {self.weak}, "
                f"path is {self.path!r}: set both, or neither"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SamplingConfig:
    """From noise to images."""

    solver: Solver = "heun"
    """The solver of the velocity field; `flow_match_*` are diffusers' schedulers."""
    steps: Annotated[int, Field(ge=1)] = 25
    """Solver steps; Heun evaluates the velocity twice a step."""
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    """uncond + scale * (cond - uncond); 1 disables guidance and its cost."""
    selection: SelectionConfig = SelectionConfig()
    """The rule that turns router logits into gates."""
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Images per batch; an image does not depend on it."""
    device: str = "cpu"
    """Torch device of the sampling."""
    reflection: ReflectionConfig | None = field(default=None, metadata=UNHASHED_IF_DEFAULT)
    """Weak-to-strong reflection; needs the solver `euler` or `heun`. With selection `auto` it stays only if the search
    finds that it helps."""

    compile: bool = field(default=False, metadata=UNHASHED_IF_DEFAULT)
    """Whether to compile networks with `torch.compile`, which takes half a minute and a C++ compiler on a CPU. Networks
    are a fifth faster then, 8-bit networks twice as fast."""

    @model_validator(mode="after")
    def _can_reflect(self) -> "SamplingConfig":
        """Raise for diffusers' schedulers: they keep state between steps, so no step can be reflected."""
        if self.reflection is not None and self.solver.startswith("flow_match"):
            raise ValueError(f"reflection needs the solver euler or heun, not {self.solver}; change one of the two")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ValidationConfig:
    """Pictures and distances of each expert alone, from its averaged parameters, while it trains."""

    every: Annotated[int, Field(ge=1)] | None = None
    """Steps between two validations, each at the next checkpoint. None: as often as the pictures cost a hundredth of
    the training's FLOPs, at most six times."""
    prompts: tuple[str, ...] = ()
    """Captions or names of classes, one picture each, from the same noise every time; empty: 16 without a condition."""
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    """Guidance of samples with a condition; 1 is none."""
    steps: Annotated[int, Field(ge=1)] = 10
    """Euler steps of a sample."""
    kid_samples: Annotated[int, Field(ge=0)] = 0
    """Samples of an expert that are compared with as many held-out images of its cluster, at most as many as there are,
    by the kernel distance (KID) in EfficientNet's features; needs `every`. 0: none."""
    beside: bool = False
    """Whether a process of its own validates, so that the training never waits: it skips a validation while the one
    before still runs. Otherwise the training waits."""
    device: str | None = None
    """Torch device of that process, such as `cpu` or `cuda:1`; None: the training's."""

    @field_validator("prompts", mode="before")
    @classmethod
    def _name_numbered_classes(cls, prompts: Any) -> Any:
        """Accept classes that are numbers, such as [3, 7]."""
        if not isinstance(prompts, list | tuple):
            return prompts
        return tuple(str(prompt) if type(prompt) is int else prompt for prompt in prompts)

    @model_validator(mode="after")
    def _is_asked_for(self) -> "ValidationConfig":
        """Check that a distance has a time, and a device a process."""
        if self.kid_samples == 1 or (self.kid_samples and self.every is None):
            raise ValueError(
                "validation.kid_samples, two at least, needs validation.every=<steps>, because it costs more than "
                f"pictures; got kid_samples={self.kid_samples} with every={self.every}"
            )
        if self.device is not None and not self.beside:
            raise ValueError(
                "validation.device is that of a process of its own; set validation.beside=true, or leave it out"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    """Scores of samples against held-out images."""

    num_samples: Annotated[int, Field(ge=16)] = 1000
    """Images per table row; at most as many as there are training images, which give the floor."""
    spaces: Annotated[tuple[FeatureSpace, ...], Field(min_length=1)] = ("efficientnet_lite0", "pixels")
    """Feature spaces of the Fréchet distance; only efficientnet_lite0 ranks, and adds KID, precision and recall."""
    components: Annotated[int, Field(ge=2)] = 64
    """Principal components of the Fréchet distance outside pixels; at most half the held-out images or samples."""
    neighbours: Annotated[int, Field(ge=1)] = 3
    """k of precision and recall."""
    conditional: bool = False
    """Whether samples have the captions or the classes of the held-out images, or no condition."""
    attributes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Words of captions that exclude each other, by the name of what they say, such as `tone: [dark, light]`: a probe
    of real images tells whether conditional samples show the word of their prompt."""
    new_combinations: tuple[str, ...] = ()
    """Words that were never trained on together, as `data.held_out_captions` has them; scored on their own too."""
    seed: Seed = 0
    """0 uses the seeds 0, 1, 2 …; every other number uses seeds of its own."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExpertSamplesConfig:
    """Samples of the experts, to train a router without the data."""

    samples_per_expert: Annotated[int, Field(ge=1)] = 2048
    """Mean number of samples per expert; each expert has its cluster's share of the total."""
    steps: Annotated[int, Field(ge=2)] = 10
    """Heun steps per sample."""
    noise_schedule: NoiseScheduleName = "rectified_flow"
    """The noise schedule of the ensemble."""
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Latents per batch."""
    device: str = "cpu"
    """Torch device of the sampling."""
    seed: Seed = 0
    """A sample depends on (seed, expert, row) alone."""


Quantile = Annotated[float, Field(gt=0, lt=1)]
Weighting = Literal["velocity", "likelihood"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AuditConfig:
    """Comparison of samples with the training set."""

    quantiles: Annotated[tuple[Quantile, ...], Field(min_length=1)] = (0.01, 0.05)
    """A sample is near if its distance is below this quantile of the held-out images."""
    suspects: Annotated[int, Field(ge=1)] = 8
    """Samples shown next to their nearest training images."""
    selection: SelectionConfig = SelectionConfig()
    """Selection of the samples; a pinned selection identifies the expert of each sample."""
    conditional: bool = False
    """Whether the samples have the classes of the held-out images."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReplicationLimits:
    """How much an expert may replicate its training images."""

    max_copy_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Largest share of near copies among an expert's samples; about .01 are near by chance. Empty checks nothing."""
    max_membership_auc: Annotated[float, Field(ge=0.5, lt=1)] | None = None
    """Largest AUC with which an expert's losses tell its training images from held-out ones. Empty checks nothing."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ClassifierConfig:
    """Classification of images by their denoising error."""

    images: Annotated[int, Field(ge=1)] = 256
    """Held-out images in total, equally from every cluster."""
    noises_per_image: Annotated[int, Field(ge=1)] = 16
    """Pairs of t and noise that an error is averaged over; equal for all classes."""
    elimination: Annotated[float, Field(gt=0)] | None = field(default=None, metadata=UNHASHED_IF_DEFAULT)
    """Standard errors by which a class must be worse than the best one to be left out of all further pairs; empty
    evaluates every class on every pair."""
    weighting: Weighting = "velocity"
    """`velocity`: uniform over t, as in Li et al. `likelihood`: the weights of the likelihood bound."""
    batch_size: Annotated[int, Field(ge=1)] = 4096
    """Rows per network call."""
    seed: Seed = 0
    """Seed of t and noise."""
