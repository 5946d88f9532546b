"""What can be chosen about making an ensemble smaller; imports no torch."""

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import STRICT, UNHASHED_IF_DEFAULT
from ensemble.compression.acceleration.config import BaseFirstConfig, CacheConfig, HookConfig, TruncateConfig
from ensemble.compression.distillation.config import ConsistencyConfig, MMDConfig, SiDConfig
from ensemble.compression.pruning.config import EcoDiffConfig, LaptopConfig
from ensemble.compression.quantization.config import MixedPrecisionConfig, QuESTConfig, SharedBaseConfig, SVDQuantConfig
from ensemble.config import SamplingConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WeightOnlyConfig:
    """Weights in few bits, rounded to nearest; activations stay as they are."""

    method: Literal["weight_only"] = "weight_only"
    bits: Literal[2, 3, 4, 5, 6, 8] = 8
    """Bits of a weight."""
    group_size: Annotated[int, Field(ge=8, multiple_of=2)] = 64
    """Entries of a row that share a scale of 16 bits."""
    min_elements: Annotated[int, Field(ge=1)] = 1024
    """Matrices with fewer entries stay as they are."""
    router: bool = True
    """Whether the router is quantized too."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DynamicInt8Config:
    """Linear layers that multiply in eight bits; other large weights are stored in few bits."""

    method: Literal["dynamic_int8"] = "dynamic_int8"
    bits: Literal[4, 5, 6, 8] = 8
    """Bits of a weight on disk."""
    group_size: Annotated[int, Field(ge=8, multiple_of=2)] = 64
    """Entries of a row that share a scale of 16 bits."""
    min_elements: Annotated[int, Field(ge=1)] = 1024
    """Matrices with fewer entries stay as they are."""
    router: bool = True
    """Whether the router is quantized too."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StitchConfig:
    """The smaller ensemble on one side of a t, the whole one on the other."""

    method: Literal["stitch"] = "stitch"
    t: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Where one gives way to the other."""
    small: Literal["late", "early"] = "late"
    """Whether the smaller one speaks below t, where samples are nearly clean, or above."""


DistillConfig = Annotated[SiDConfig | ConsistencyConfig | MMDConfig, Field(discriminator="method")]
AccelerateConfig = Annotated[CacheConfig | HookConfig | TruncateConfig | BaseFirstConfig, Field(discriminator="method")]
PruneConfig = Annotated[LaptopConfig | EcoDiffConfig, Field(discriminator="method")]
QuantizeConfig = Annotated[
    WeightOnlyConfig | DynamicInt8Config | SVDQuantConfig | QuESTConfig | SharedBaseConfig | MixedPrecisionConfig,
    Field(discriminator="method"),
]
MethodConfig = Annotated[
    DistillConfig | AccelerateConfig | PruneConfig | QuantizeConfig | StitchConfig, Field(discriminator="method")
]


def check_order(stages: Mapping[str, Any], *, reflects: bool) -> None:
    """Raise `ValueError` for stages, by kind, that make no sense together, or with reflection."""
    distill, accelerate, prune = (stages.get(kind) for kind in ("distill", "accelerate", "prune"))
    quantize, switch = (stages.get(kind) for kind in ("quantize", "stitch"))
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
        "accelerate goes between each expert and its student, and there is one for all; take distill.students=per_expert": (
            distill and distill.students == "shared" and accelerate
        ),
        "stitch goes between experts that are asked at the same t, and after distill or a draft they are not, and "
        "diffusers' hooks want every step; leave stitch out, or take accelerate=base_first": switch
        and (distill or is_several or isinstance(accelerate, HookConfig)),
        "prune=ecodiff learns along whole trajectories, and after distill or a draft there are none; take "
        "prune=laptop": (distill or is_several) and isinstance(prune, EcoDiffConfig),
        "prune takes out layers that diffusers' hooks were tried on; take accelerate=cache": prune
        and isinstance(accelerate, HookConfig),
        "quantize=shared_base and mixed_precision look at experts of one network each; take another after a draft or base_first": (
            is_several and isinstance(quantize, SharedBaseConfig | MixedPrecisionConfig)
        ),
        "reflection goes between the steps of a solver, and after distill or a draft there are none, and a cache "
        "counts them; leave ensemble.reflection out": reflects and (distill or accelerate),
    }
    if broken := next((rule for rule, is_broken in rules.items() if is_broken), None):
        raise ValueError(broken)


def compression_label(recipe: MethodConfig) -> str:
    """What a recipe is called in tables and file names."""
    if isinstance(recipe, WeightOnlyConfig):
        return f"int{recipe.bits}_weight_only"
    if isinstance(recipe, DynamicInt8Config):
        return f"int{recipe.bits}_dynamic"
    if isinstance(recipe, CacheConfig):
        return f"cache_{recipe.policy}"
    if isinstance(recipe, HookConfig):
        return f"hook_{recipe.hook}"
    if isinstance(recipe, TruncateConfig):
        return f"truncate_{recipe.draft}"
    if isinstance(recipe, SiDConfig | ConsistencyConfig | MMDConfig):
        return f"{recipe.method}_{recipe.steps}" + ("_shared" if recipe.students == "shared" else "")
    return recipe.method


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CompressionConfig:
    """One stage on an ensemble, and how its samples are compared."""

    method: MethodConfig
    """What is done."""
    sampling: SamplingConfig
    """How both ensembles are sampled."""
    labelled: bool = field(default=True, metadata=UNHASHED_IF_DEFAULT)
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
