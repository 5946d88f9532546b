"""Training on an interval of t: the t of a training, those outside of the interval mapped into it by their quantile.

    q' = F(low) + (F(high) - F(low)) F(t),   t' = F^-1(q'),   F the distribution of t of the training

t' has the density of t, restricted to the interval, and is a function of t: noise and order of samples stay the same.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from experts.config import TrainingConfig
from experts.diffusion.noise_schedule import shift_times
from experts.types import RowTimes

Interval = tuple[float, float]
WHOLE: Interval = (0.0, 1.0)


def share_of(interval: Interval, training: TrainingConfig) -> float:
    """Return the share of the t of a training that lie in an interval."""
    low, high = _quantiles(torch.tensor(interval, dtype=torch.float64), training).tolist()
    return float(high - low)


def restrict_times(t: RowTimes, interval: Interval, training: TrainingConfig) -> RowTimes:
    """Return each t mapped into the interval; t is distributed as the training draws it."""
    low, high = _quantiles(torch.tensor(interval, dtype=torch.float64), training).tolist()
    normal = torch.special.ndtri(low + (high - low) * _quantiles(t.double(), training))
    restricted = shift_times((training.t_mean + training.t_std * normal).sigmoid(), training.t_shift)
    return restricted.clamp(*interval).to(t)


def restrict_loss(loss: Callable[..., Any], interval: Interval, training: TrainingConfig) -> Callable[..., Any]:
    """Return a loss (model, batch) whose t lie in the interval."""

    def restricted(model: nn.Module, batch: Any) -> Any:
        return loss(model, replace(batch, t=restrict_times(batch.t, interval, training)))

    return restricted


def _quantiles(t: Tensor, training: TrainingConfig) -> Tensor:
    """Return the share of the t of a training below each t: t is a shifted logit-normal number."""
    logits = torch.special.logit(shift_times(t, 1 / training.t_shift).clamp(0, 1))
    quantiles: Tensor = torch.special.ndtr((logits - training.t_mean) / training.t_std)
    return quantiles
