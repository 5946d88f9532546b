"""Training cost of a router, computed in advance: rows through the network, with and without a gradient."""

from collections.abc import Callable
from typing import Final

from experts.training.flops import training_flops
from router.calibration.temperature import ROWS_PER_BIN
from router.calibration.text_prior import MAX_CAPTIONS, MAX_EVALUATIONS, STRENGTHS
from router.calibration.time_bins import BINS
from router.config import RouterConfig, RouterKind
from router.models.density_ratio import divide_batch
from router.models.nearest_centroid import MOMENT_ROWS
from router.quality import MAX_IMAGES


def _full_batch_rows(config: RouterConfig, _num_experts: int) -> int:
    return config.training.batch_size * config.training.steps


def _head_batch_rows(config: RouterConfig, num_experts: int) -> int:
    return divide_batch(config.training, num_experts).batch_size * config.training.steps


def _zero_rows(_config: RouterConfig, _num_experts: int) -> int:
    return 0


GRADIENT_ROWS: Final[dict[RouterKind, Callable[[RouterConfig, int], int]]] = {
    "mlp": _full_batch_rows,
    "transformer": _full_batch_rows,
    "prior_table": _zero_rows,
    "nearest_centroid": _zero_rows,
    "density_ratio": _head_batch_rows,
    "density": _zero_rows,
}


def count_gradient_rows(config: RouterConfig, num_experts: int) -> int:
    """Return the number of training rows; for `density_ratio`, each row passes through every head."""
    return GRADIENT_ROWS[config.kind](config, num_experts)


def is_calibrated(config: RouterConfig) -> bool:
    """Return whether temperatures are fitted: not for tables, and not if only samples of experts are given."""
    return config.calibrate and config.kind not in ("prior_table", "density") and config.data == "real"


def count_forward_rows(config: RouterConfig) -> int:
    """Return the number of rows for temperatures, scales and moments; a covariance row counts as one, at most."""
    calibration = 2 * BINS * ROWS_PER_BIN if is_calibrated(config) else 0
    return calibration + (MOMENT_ROWS + BINS * ROWS_PER_BIN if config.kind == "nearest_centroid" else 0)


def max_quality_images(config: RouterConfig, num_experts: int) -> int:
    """Return the most held-out images that quality is measured on: fewer where a row calls the experts."""
    return max(1, MAX_IMAGES // (config.draws * num_experts)) if config.kind == "density" else MAX_IMAGES


def text_prior_cost(samples: int, pooled_width: int, num_classes: int, num_experts: int) -> float:
    """Return the most FLOPs of the fit of p(k | text) to the captions of samples; 0 without a pooled vector.

    Every evaluation of the loss and its gradient costs three products of features and slopes.
    """
    rows = min(samples, MAX_CAPTIONS) * (2 if num_classes else 1)
    product = 2.0 * rows * (pooled_width + num_classes) * num_experts
    return 3 * product * MAX_EVALUATIONS * (len(STRENGTHS) + 1) if pooled_width else 0.0


def training_cost(config: RouterConfig, row_flops: float, num_experts: int) -> float:
    """Return the FLOPs of a complete training, from those of one row through the network."""
    return training_flops(row_flops, count_gradient_rows(config, num_experts), 1) + row_flops * count_forward_rows(
        config
    )
