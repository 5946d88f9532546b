"""What can be chosen about making an ensemble smaller; imports no torch."""

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import LATER, STRICT
from ensemble.compression.acceleration.config import BaseFirstConfig, CacheConfig, HookConfig, TruncateConfig
from ensemble.compression.distillation.config import ConsistencyConfig, MMDConfig, SiDConfig
from ensemble.compression.pruning.config import EcoDiffConfig, LaptopConfig
from ensemble.compression.quantization.config import BitsConfig, QuESTConfig, ShareConfig, SVDQuantConfig
from ensemble.config import SamplingConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WeightsConfig:
    """Weights in few bits, rounded to nearest; activations stay as they are."""

    method: Literal["weights"] = "weights"
    bits: Literal[2, 3, 4, 5, 6, 8] = 8
    """Bits of a weight."""
    group: Annotated[int, Field(ge=8, multiple_of=2)] = 64
    """Entries of a row that share a scale of 16 bits."""
    least: Annotated[int, Field(ge=1)] = 1024
    """Matrices with fewer entries stay as they are."""
    router: bool = True
    """Whether the router is quantized too."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ComputeConfig:
    """Linear layers that multiply in eight bits; other large weights are stored in few bits."""

    method: Literal["compute"] = "compute"
    bits: Literal[4, 5, 6, 8] = 8
    """Bits of a weight on disk."""
    group: Annotated[int, Field(ge=8, multiple_of=2)] = 64
    """Entries of a row that share a scale of 16 bits."""
    least: Annotated[int, Field(ge=1)] = 1024
    """Matrices with fewer entries stay as they are."""
    router: bool = True
    """Whether the router is quantized too."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SwitchConfig:
    """The smaller ensemble on one side of a t, the whole one on the other."""

    method: Literal["switch"] = "switch"
    t: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Where one gives way to the other."""
    small: Literal["clean", "noisy"] = "clean"
    """Whether the smaller one speaks below t, where samples are nearly clean, or above."""


DistillConfig = Annotated[SiDConfig | ConsistencyConfig | MMDConfig, Field(discriminator="method")]
AccelerateConfig = Annotated[CacheConfig | HookConfig | TruncateConfig | BaseFirstConfig, Field(discriminator="method")]
PruneConfig = Annotated[LaptopConfig | EcoDiffConfig, Field(discriminator="method")]
QuantizeConfig = Annotated[
    WeightsConfig | ComputeConfig | SVDQuantConfig | QuESTConfig | ShareConfig | BitsConfig,
    Field(discriminator="method"),
]
RecipeConfig = Annotated[
    DistillConfig | AccelerateConfig | PruneConfig | QuantizeConfig | SwitchConfig, Field(discriminator="method")
]


def check_order(stages: Mapping[str, Any], *, reflects: bool) -> None:
    """Raise `ValueError` for stages, by kind, that make no sense together, or with reflection."""
    distill, accelerate, prune = (stages.get(kind) for kind in ("distill", "accelerate", "prune"))
    quantize, switch = (stages.get(kind) for kind in ("quantize", "switch"))
    is_kept = isinstance(accelerate, CacheConfig | HookConfig)
    draft = accelerate.draft if isinstance(accelerate, TruncateConfig) else None
    is_several = draft is not None or isinstance(accelerate, BaseFirstConfig)
    rules = {
        "a cache keeps features from one step to the next, and of the few steps that distill leaves none is like "
        "another; take one of the two": distill and is_kept,
        "accelerate=base_first puts the experts before their students; add distill=…": not distill
        and isinstance(accelerate, BaseFirstConfig),
        "accelerate.draft=student begins with what students draw; add distill=…, or take another": not distill
        and draft == "student",
        f"accelerate.draft={draft} goes on with the experts, so the students of distill would not be asked; take "
        "accelerate.draft=student, or leave distill out": distill and draft not in (None, "student"),
        "accelerate goes between each expert and its student, and there is one for all; take distill.students=each": (
            distill and distill.students == "one" and accelerate
        ),
        "switch goes between experts that are asked at the same t, and after distill or a draft they are not, and "
        "diffusers' hooks want every step; leave switch out, or take accelerate=base_first": switch
        and (distill or is_several or isinstance(accelerate, HookConfig)),
        "prune=ecodiff learns along whole trajectories, and after distill or a draft there are none; take "
        "prune=laptop": (distill or is_several) and isinstance(prune, EcoDiffConfig),
        "prune takes out layers that diffusers' hooks were tried on; take accelerate=cache": prune
        and isinstance(accelerate, HookConfig),
        "quantize=shared and budget look at experts of one network each; take another after a draft or base_first": (
            is_several and isinstance(quantize, ShareConfig | BitsConfig)
        ),
        "reflection goes between the steps of a solver, and after distill or a draft there are none, and a cache "
        "counts them; leave ensemble.reflection out": reflects and (distill or accelerate),
    }
    if broken := next((rule for rule, is_broken in rules.items() if is_broken), None):
        raise ValueError(broken)


def label_of(recipe: RecipeConfig) -> str:
    """What a recipe is called in tables and file names."""
    if isinstance(recipe, WeightsConfig):
        return f"int{recipe.bits}"
    if isinstance(recipe, ComputeConfig):
        return f"int{recipe.bits}_compute"
    if isinstance(recipe, CacheConfig):
        return f"cache_{recipe.policy}"
    if isinstance(recipe, HookConfig):
        return f"hook_{recipe.hook}"
    if isinstance(recipe, TruncateConfig):
        return f"truncate_{recipe.draft}"
    if isinstance(recipe, SiDConfig | ConsistencyConfig | MMDConfig):
        return f"{recipe.method}_{recipe.steps}" + ("_dense" if recipe.students == "one" else "")
    return recipe.method


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StageConfig:
    """One stage on an ensemble, and how its samples are compared."""

    recipe: RecipeConfig
    """What is done."""
    sampling: SamplingConfig
    """How both ensembles are sampled."""
    labelled: bool = field(default=True, metadata=LATER)
    """Whether networks are shown the classes of what calibrates and trains them; False if they have never seen any."""
    num_samples: Annotated[int, Field(ge=1)] = 64
    """Images that are compared."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TimingConfig:
    """How the processor time of an image is measured."""

    sampling: SamplingConfig
    """How images are drawn."""
    num_images: Annotated[int, Field(ge=1)] = 64
    """Images of a turn."""
    turns: Annotated[int, Field(ge=2)] = 5
    """How often both ensembles are timed, one after the other."""
