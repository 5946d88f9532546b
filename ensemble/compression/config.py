"""Settings of every compression method, the order in which stages may follow each other, and their labels.

Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import STRICT, UNHASHED_IF_DEFAULT
from ensemble.compression.acceleration.config import BaseFirstConfig, CacheConfig, HookConfig, TruncateConfig
from ensemble.compression.distillation.config import (
    ConsistencyConfig,
    MeanFlowConfig,
    MMDConfig,
    SCMConfig,
    SiDConfig,
    SignConfig,
    SpeedUpNetConfig,
)
from ensemble.compression.pruning.config import AssemblyConfig, EcoDiffConfig, LaptopConfig, RegionalConfig
from ensemble.compression.quantization.config import (
    LearngenesConfig,
    MixedPrecisionConfig,
    QuESTConfig,
    SharedBaseConfig,
    SVDQuantConfig,
)
from ensemble.config import SamplingConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WeightOnlyConfig:
    """Weights in few bits, rounded to nearest; activations keep full precision."""

    method: Literal["weight_only"] = "weight_only"
    bits: Literal[2, 3, 4, 5, 6, 8] = 8
    """Bits per weight."""
    group_size: Annotated[int, Field(ge=8, multiple_of=2)] = 64
    """Neighboring weights of a row that share one 16-bit scale."""
    min_elements: Annotated[int, Field(ge=1)] = 1024
    """Matrices with fewer elements are not quantized."""
    router: bool = True
    """Also quantize the router."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DynamicInt8Config:
    """Linear layers that multiply in 8 bits; other large weights are stored in few bits."""

    method: Literal["dynamic_int8"] = "dynamic_int8"
    bits: Literal[4, 5, 6, 8] = 8
    """Bits per stored weight."""
    group_size: Annotated[int, Field(ge=8, multiple_of=2)] = 64
    """Neighboring weights of a row that share one 16-bit scale."""
    min_elements: Annotated[int, Field(ge=1)] = 1024
    """Matrices with fewer elements are not quantized."""
    router: bool = True
    """Also quantize the router."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StitchConfig:
    """The compressed ensemble samples on one side of a time t, the original on the other side."""

    method: Literal["stitch"] = "stitch"
    t: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """The time at which sampling switches from one ensemble to the other."""
    small: Literal["late", "early", "auto"] = "late"
    """Where the compressed ensemble is used. `late`: below `t`, where samples are nearly clean. `early`: above `t`.
    `auto`: on as many of the run's steps as are below `t`, at the end where samples are nearer to the original's."""


AnyDistillConfig = SiDConfig | ConsistencyConfig | MMDConfig | MeanFlowConfig | SCMConfig | SignConfig
DistillConfig = Annotated[AnyDistillConfig | SpeedUpNetConfig, Field(discriminator="method")]
AccelerateConfig = Annotated[CacheConfig | HookConfig | TruncateConfig | BaseFirstConfig, Field(discriminator="method")]
PruneConfig = Annotated[LaptopConfig | EcoDiffConfig | AssemblyConfig | RegionalConfig, Field(discriminator="method")]
QuantizeConfig = Annotated[
    WeightOnlyConfig
    | DynamicInt8Config
    | SVDQuantConfig
    | QuESTConfig
    | SharedBaseConfig
    | LearngenesConfig
    | MixedPrecisionConfig,
    Field(discriminator="method"),
]
MethodConfig = Annotated[
    DistillConfig | AccelerateConfig | PruneConfig | QuantizeConfig | StitchConfig, Field(discriminator="method")
]


def check_order(
    stages: Mapping[str, Any], sampling: SamplingConfig, *, reads_text_alone: bool, is_changed: bool
) -> None:
    """Raise `ValueError` for stages, by kind, that cannot be combined with each other, or with the sampling.

    `reads_text_alone` is a run with captions and without classes, `is_changed` one that compresses another ensemble.
    """
    distill, accelerate, prune = (stages.get(kind) for kind in ("distill", "accelerate", "prune"))
    distill = None if isinstance(distill, SpeedUpNetConfig) else distill
    quantize, stitch = (stages.get(kind) for kind in ("quantize", "stitch"))
    is_cached = isinstance(accelerate, CacheConfig | HookConfig)
    draft = accelerate.draft if isinstance(accelerate, TruncateConfig) else None
    has_two_networks = draft is not None or isinstance(accelerate, BaseFirstConfig)
    is_alone = not is_changed and not any(stages.get(kind) for kind in ("distill", "accelerate", "prune", "quantize"))
    reflects = sampling.reflection is not None
    rules = {
        "stitch needs a compressed ensemble besides the original one; add prune=… or quantize=…": stitch and is_alone,
        "distill=mmd compares samples of equal classes, and texts are hardly ever equal; choose distill=sid or "
        "distill=consistency": reads_text_alone and isinstance(distill, MMDConfig),
        "distill and a feature cache cannot be combined: a cache reuses features of similar steps, and the few steps "
        "of a student differ; remove distill or accelerate": distill and is_cached,
        "accelerate=base_first needs students, which take over after the first step; add distill=…": not distill
        and isinstance(accelerate, BaseFirstConfig),
        "accelerate.draft=student needs students, which generate the draft; add distill=…, or choose another draft": (
            not distill and draft == "student"
        ),
        f"accelerate.draft={draft} refines drafts with the original experts, so the students of distill would not be "
        "used; set accelerate.draft=student, or remove distill": distill and draft not in (None, "student"),
        "accelerate combines each expert with its own student, and distill.students=shared trains only one; set "
        "distill.students=per_expert": distill and distill.students == "shared" and accelerate,
        "stitch needs experts that can be evaluated at any t; after distill, a draft or diffusers' hooks they cannot; "
        "remove stitch, or set accelerate=base_first": stitch
        and (distill or has_two_networks or isinstance(accelerate, HookConfig)),
        "prune=ecodiff trains masks along full trajectories, which distill and drafts replace; set prune=laptop": (
            (distill or has_two_networks) and isinstance(prune, EcoDiffConfig)
        ),
        "prune removes layers for which diffusers' hooks were calibrated; set accelerate=cache": prune
        and isinstance(accelerate, HookConfig),
        "shared_base, learngenes and mixed_precision need experts of one network each, and a draft or base_first gives "
        "them two; set quantize to another method": has_two_networks
        and isinstance(quantize, SharedBaseConfig | LearngenesConfig | MixedPrecisionConfig),
        "ensemble.reflection works between solver steps; students and drafts have none, and a cache counts them; "
        "remove ensemble.reflection": reflects and (distill or accelerate),
    }
    if broken := next((rule for rule, is_broken in rules.items() if is_broken), None):
        raise ValueError(broken)


def compression_label(method: MethodConfig) -> str:
    """Return the name of a method in tables and file names."""
    if isinstance(method, WeightOnlyConfig):
        return f"int{method.bits}_weight_only"
    if isinstance(method, DynamicInt8Config):
        return f"int{method.bits}_dynamic"
    if isinstance(method, CacheConfig):
        return f"cache_{method.policy}"
    if isinstance(method, HookConfig):
        return f"hook_{method.hook}"
    if isinstance(method, TruncateConfig):
        return f"truncate_{method.draft}"
    if isinstance(method, AnyDistillConfig):
        return f"{method.method}_{method.steps}" + ("_shared" if method.students == "shared" else "")
    return method.method


BATCH_SIZES = (1, 16, 64)
BatchSizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CompressionConfig:
    """One compression stage, and how its samples are compared with the original's."""

    method: MethodConfig
    """The method and its settings."""
    sampling: SamplingConfig
    """How both ensembles are sampled for the comparison."""
    labelled: bool = field(default=True, metadata=UNHASHED_IF_DEFAULT)
    """Condition calibration and training data on their classes; False for experts that were trained without classes."""
    num_samples: Annotated[int, Field(ge=1)] = 64
    """Images compared; as many have their FLOPs counted."""
    batch_sizes: BatchSizes = BATCH_SIZES
    """Requests whose FLOPs and memory are measured, in images."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TimingConfig:
    """How the processor time per image is measured."""

    sampling: SamplingConfig
    """How images are sampled."""
    labelled: bool = field(default=True, metadata=UNHASHED_IF_DEFAULT)
    """Sample with the conditions of the data; False for experts that were trained without classes."""
    batch_sizes: BatchSizes = BATCH_SIZES
    """Requests that are timed, in images; the largest gives the ratio that tables show."""
    turns: Annotated[int, Field(ge=2)] = 5
    """Rounds; each times both ensembles, one after the other."""
