"""Two networks that share a trajectory: the order of them is measured at equal FLOPs."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from ddm_core.artifacts import Workspace
from ensemble.compression.handover import order_by_distance
from ensemble.compression.method import StageError
from tests.ensemble.compression.trained import digits, trained


def test_both_orders_use_the_small_network_equally_often(tmp_path):
    full = trained("dit", Workspace.at(tmp_path), 60)
    small = replace(full, model=deepcopy(full.model))
    calls = {"small": 0, "full": 0}
    small.model.register_forward_hook(lambda *_: calls.update(small=calls["small"] + 1))
    full.model.register_forward_hook(lambda *_: calls.update(full=calls["full"] + 1))
    (late, none), (early, nothing) = order_by_distance(small, full, 0.4, 8, digits())
    assert none == nothing == 0 and calls == {"small": 2 * 3, "full": 8 + 2 * 5}
    assert late.experts[0] is small is early.experts[1] and late.bounds[0] < early.bounds[0]
    with torch.no_grad():
        next(small.model.parameters()).add_(0.3)
    (_, late_distance), (_, early_distance) = order_by_distance(small, full, 0.4, 8, digits())
    assert min(late_distance, early_distance) > 0 and late_distance != early_distance
    with pytest.raises(StageError, match="leaves 0 of 8 steps below it"):
        order_by_distance(small, full, 0.1, 8, digits())
