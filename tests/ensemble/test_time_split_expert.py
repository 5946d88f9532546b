"""Experts whose networks divide [0, 1] by t."""

import pytest
import torch

from ddm_core.artifacts import CorruptArtifact, write_json
from ensemble.ensemble import Ensemble
from ensemble.evaluation.generate import RowFlops
from ensemble.pipeline import EnsemblePipeline
from ensemble.sampling.prompts import Prompts
from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.time_split import TIME_SPLIT, TimeSplitExpert
from tests.ensemble.test_pipeline import FULL, SHAPE, make_expert, parts, put_together

__all__ = ["parts"]


def load_experts(folder):
    return [Expert.load(make_expert(folder / f"network_{k}", k)) for k in range(2)]


def test_velocity_uses_the_network_of_each_interval(tmp_path):
    experts = load_experts(tmp_path)
    expert = TimeSplitExpert(experts=experts, bounds=(0.4,))
    noised, t = torch.randn(5, *SHAPE), torch.tensor([0.0, 0.39, 0.4, 0.7, 1.0])
    assert expert.takes_any_t
    velocity = expert.velocity(noised, t, Condition.null(5), RECTIFIED_FLOW)
    low, high = (part.velocity(noised, t, Condition.null(5), RECTIFIED_FLOW) for part in experts)
    torch.testing.assert_close(velocity, torch.cat([low[:2], high[2:]]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bounds", [(), (0.0,), (1.0,), (0.5, 0.4), (0.3, 0.6)])
def test_invalid_bounds_raise(bounds, tmp_path):
    with pytest.raises(ValueError, match="rising between 0 and 1"):
        TimeSplitExpert(experts=load_experts(tmp_path), bounds=bounds)


def test_time_split_pipeline_round_trip_and_flops(parts, tmp_path):
    original = put_together(parts)
    experts = {
        k: TimeSplitExpert(experts=(expert, original.ensemble.experts[0]), bounds=(0.5,))
        for k, expert in original.ensemble.experts.items()
    }
    mixed = EnsemblePipeline(
        ensemble=Ensemble(
            experts=experts, noise_schedule=original.ensemble.noise_schedule, router=original.ensemble.router
        ),
        codec=original.codec,
        num_classes=original.num_classes,
        class_names=original.class_names,
    )
    mixed.save_pretrained(tmp_path / "mixed")
    again = EnsemblePipeline.from_pretrained(tmp_path / "mixed")
    prompts = Prompts.of_classes([0, 1])
    latents, *others = (pipeline([1, 2], FULL, prompts).latents for pipeline in (again, mixed, original))
    assert [torch.equal(latents, other) for other in others] == [True, False]
    assert RowFlops.measure(again).experts == RowFlops.measure(original).experts
    write_json(tmp_path / "mixed" / "expert_1" / TIME_SPLIT, {"bounds": "x"})
    with pytest.raises(CorruptArtifact, match="does not divide"):
        EnsemblePipeline.from_pretrained(tmp_path / "mixed")
