"""Learning-rate schedules: the same linear warm-up for all, and then a schedule by its name in the configuration.

linear               falls to zero at the last step
constant             stays
cosine               falls to zero along half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983)
warmup_stable_decay  stays, then falls linearly to zero (Hu et al. 2024, arXiv:2404.06395)
"""

import math
from collections.abc import Callable

import torch

from experts.config import LRScheduleName, TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Return the learning rate of a step, counted from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    return LR_SCHEDULES[config.lr_schedule](step, config)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all parameters this learning rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # a compiled step reads it from there
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _linear(step: int, config: TrainingConfig) -> float:
    return config.lr * (config.steps - step) / (config.steps - config.warmup_steps)


def _constant(step: int, config: TrainingConfig) -> float:  # noqa: ARG001 - the same for every step
    return config.lr


def _cosine(step: int, config: TrainingConfig) -> float:
    share = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return config.lr * (1 + math.cos(math.pi * share)) / 2


def _warmup_stable_decay(step: int, config: TrainingConfig) -> float:
    decay_steps = max(1, round(config.decay_share * config.steps))
    return config.lr * min(1.0, (config.steps - step) / decay_steps)


LR_SCHEDULES: dict[LRScheduleName, Callable[[int, TrainingConfig], float]] = {
    "linear": _linear,
    "constant": _constant,
    "cosine": _cosine,
    "warmup_stable_decay": _warmup_stable_decay,
}
"""By name: (step from the end of the warm-up on, configuration) to the learning rate."""
