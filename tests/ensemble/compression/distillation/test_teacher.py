"""The whole ensemble as a teacher."""

from dataclasses import replace

import pytest
import torch

from ensemble.compression.distillation.teacher import build_ensemble_teacher, router_flops
from ensemble.compression.method import StageError
from ensemble.ensemble import Ensemble
from experts.conditions.condition import Condition
from experts.expert import Expert
from router.config import SelectionConfig
from tests.ensemble.test_pipeline import SHAPE, make_expert, parts, put_together

__all__ = ["parts"]


def test_the_teacher_velocity_equals_full_ensemble_velocity(parts):
    ensemble = put_together(parts).ensemble
    noised, t = torch.randn(5, *SHAPE), torch.linspace(0.1, 0.9, 5)
    condition = Condition(torch.tensor([0, 1, -1, 0, 1]))
    routing = ensemble.init_routing(range(5), condition, SelectionConfig(name="full"))
    teacher = build_ensemble_teacher(ensemble, "cpu")
    expected = ensemble.velocity(noised, t, condition, routing)
    torch.testing.assert_close(teacher.velocity(noised, t, condition), expected, atol=1e-5, rtol=1e-4)
    noised.requires_grad_(True)
    teacher.velocity(noised, t, condition).sum().backward()
    assert noised.grad.abs().sum() > 0 and router_flops(teacher, SHAPE) > 0
    models = [expert.model for expert in ensemble.experts.values()]
    assert all(parameter.requires_grad for model in models for parameter in model.parameters()), (
        "the teacher freezes copies"
    )


def test_a_teacher_needs_all_experts_and_a_router(parts, tmp_path):
    ensemble = put_together(parts).ensemble
    incomplete = replace(ensemble, experts={0: ensemble.experts[0]})
    without_router = Ensemble(
        experts={0: Expert.load(make_expert(tmp_path / "e", 0))}, noise_schedule=ensemble.noise_schedule
    )
    for ensemble in (incomplete, without_router):
        with pytest.raises(StageError, match=r"set distill\.students=per_expert"):
            build_ensemble_teacher(ensemble, "cpu")
