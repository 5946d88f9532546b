"""What a compression cannot fall below, known from its configuration alone: so a search starts nothing in vain."""

from ensemble.compression.acceleration.config import CacheConfig, HookConfig
from ensemble.compression.config import QuantizeConfig
from ensemble.compression.distillation.config import SpeedUpNetConfig
from ensemble.compression.pruning.config import RegionalConfig
from ensemble.compression.quantization.config import MixedPrecisionConfig
from orchestrator.config.schema import RunConfig

FLOAT_BITS = 32
MARGIN = 0.5
"""Layers differ in size, pruning may remove more than asked, and shared bases count for several experts."""


def least_ratios(config: RunConfig) -> dict[str, float]:
    """Return the least bytes and FLOPs, relative to the original ensemble, that the compression stages can reach."""
    # Regions keep the parameters, and what share of the FLOPs is attention depends on the size of the maps.
    is_regional = isinstance(config.prune, RegionalConfig)
    kept = 1.0 if config.prune is None or isinstance(config.prune, RegionalConfig) else 1.0 - config.prune.ratio
    experts = config.partition.num_experts
    bits = FLOAT_BITS if config.quantize is None else _least_bits(config.quantize, experts)
    is_shared = config.distill is not None and config.distill.students == "shared"
    solver_steps = config.ensemble.steps * 2
    distill = config.ensemble if isinstance(config.distill, SpeedUpNetConfig) else config.distill
    steps = solver_steps if distill is None else min(solver_steps, distill.steps)
    interval = config.accelerate.interval if isinstance(config.accelerate, CacheConfig | HookConfig) else 1.0
    return {
        "bytes": MARGIN * kept * bits / FLOAT_BITS / (experts if is_shared else 1),
        "flops": 0.0 if is_regional else MARGIN * kept * steps / solver_steps / interval,
    }


def _least_bits(quantize: QuantizeConfig, experts: int) -> float:
    """Return the bits of a stored weight, without scales."""
    if isinstance(quantize, MixedPrecisionConfig):
        return float(min(quantize.choices))
    return float(quantize.bits) / (experts if quantize.method in ("shared_base", "learngenes") else 1)
