from math import sqrt
from typing import get_args

import pytest

from experts.config import LRScheduleName, TrainingConfig
from experts.training.optimizers.lr_schedules import LR_SCHEDULES, learning_rate

AFTER_WARMUP = {
    "linear": [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0],
    "constant": [1] * 7,
    "cosine": [1, (2 + sqrt(3)) / 4, 3 / 4, 1 / 2, 1 / 4, (2 - sqrt(3)) / 4, 0],
    "warmup_stable_decay": [1, 1, 1, 1, 2 / 3, 1 / 3, 0],
}


def test_every_name_has_a_schedule():
    assert set(LR_SCHEDULES) == set(get_args(LRScheduleName)) == set(AFTER_WARMUP)


@pytest.mark.parametrize("name", AFTER_WARMUP)
def test_learning_rate_rises_and_follows_its_schedule(name):
    config = TrainingConfig(steps=10, warmup_steps=4, lr=1.0, lr_schedule=name, decay_share=0.3)
    rates = [learning_rate(step, config) for step in range(11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == pytest.approx(AFTER_WARMUP[name], abs=1e-12)


@pytest.mark.parametrize("name", AFTER_WARMUP)
def test_warmup_longer_than_training_only_rises(name):
    config = TrainingConfig(steps=2, warmup_steps=4, lr=1.0, lr_schedule=name)
    assert [learning_rate(step, config) for step in range(2)] == [0.25, 0.5]


def test_linear_has_the_same_bits_as_before_the_registry():
    config = TrainingConfig(steps=1500, warmup_steps=100, lr=1e-3)
    assert [learning_rate(step, config) for step in range(100, 1500)] == [
        config.lr * (1500 - step) / 1400 for step in range(100, 1500)
    ]
