"""What a router costs to train, known before it is: rows through the network, with a gradient or without."""

from collections.abc import Callable
from typing import Final

from experts.training.flops import training_flops
from router.calibration.temperature import ROWS
from router.calibration.time_bins import BINS
from router.config import RouterConfig, RouterKind
from router.models.density_ratio import share_of_batch
from router.models.nearest_centroid import MOMENT_ROWS


def _whole_batches(config: RouterConfig, _num_experts: int) -> int:
    return config.training.batch_size * config.training.steps


def _shared_batches(config: RouterConfig, num_experts: int) -> int:
    return share_of_batch(config.training, num_experts).batch_size * config.training.steps


def _none(_config: RouterConfig, _num_experts: int) -> int:
    return 0


GRADIENT_ROWS: Final[dict[RouterKind, Callable[[RouterConfig, int], int]]] = {
    "mlp": _whole_batches,
    "transformer": _whole_batches,
    "prior_table": _none,
    "nearest_centroid": _none,
    "density_ratio": _shared_batches,
}


def gradient_rows(config: RouterConfig, num_experts: int) -> int:
    """Rows that are trained on; for `density_ratio`, each of them goes through every head."""
    return GRADIENT_ROWS[config.kind](config, num_experts)


def is_calibrated(config: RouterConfig) -> bool:
    """Whether temperatures are fitted: not for a table, and not where nothing but samples from experts is given."""
    return config.calibrate and config.kind != "prior_table" and config.data == "real"


def forward_rows(config: RouterConfig) -> int:
    """Rows that temperatures and scales are fitted on; a row of a covariance counts as one, which is never too few."""
    calibration = 2 * BINS * ROWS if is_calibrated(config) else 0
    return calibration + (MOMENT_ROWS + BINS * ROWS if config.kind == "nearest_centroid" else 0)


def training_cost(config: RouterConfig, row_flops: float, num_experts: int) -> float:
    """FLOPs of a whole training, from those of one row through the network."""
    return training_flops(row_flops, gradient_rows(config, num_experts), 1) + row_flops * forward_rows(config)
