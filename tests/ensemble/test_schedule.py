"""An expert that is several networks by turns."""

import pytest
import torch

from ddm_core.artifacts import CorruptArtifact, write_json
from ensemble.ensemble import Ensemble
from ensemble.evaluation.generate import RowFlops
from ensemble.multi_network_experts import TIME_SPLIT, TimeSplitExpert
from ensemble.pipeline import DDMPipeline
from experts.condition import Condition
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from tests.ensemble.test_pipeline import FULL, SHAPE, make_expert, parts, put_together

__all__ = ["parts"]


def both(folder):
    return [Expert.load(make_expert(folder / f"network_{k}", k)) for k in range(2)]


def test_every_row_is_answered_by_the_network_of_its_interval(tmp_path):
    networks = both(tmp_path)
    scheduled = TimeSplitExpert(networks=networks, bounds=(0.4,))
    noised, t = torch.randn(5, *SHAPE), torch.tensor([0.0, 0.39, 0.4, 0.7, 1.0])
    said = scheduled.velocity(noised, t, Condition.null(5), RECTIFIED_FLOW)
    low, high = (network.velocity(noised, t, Condition.null(5), RECTIFIED_FLOW) for network in networks)
    torch.testing.assert_close(said, torch.cat([low[:2], high[2:]]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bounds", [(), (0.0,), (1.0,), (0.5, 0.4), (0.3, 0.6)])
def test_what_divides_nothing_is_refused(bounds, tmp_path):
    with pytest.raises(ValueError, match="rising between 0 and 1"):
        TimeSplitExpert(networks=both(tmp_path), bounds=bounds)


def test_a_pipeline_with_schedules_is_saved_loaded_sampled_and_counted(parts, tmp_path):
    whole = put_together(parts)
    experts = {
        k: TimeSplitExpert(networks=(expert, whole.ensemble.experts[0]), bounds=(0.5,))
        for k, expert in whole.ensemble.experts.items()
    }
    mixed = DDMPipeline(
        ensemble=Ensemble(experts=experts, noise_schedule=whole.ensemble.noise_schedule, router=whole.ensemble.router),
        codec=whole.codec,
        num_classes=whole.num_classes,
        class_names=whole.class_names,
    )
    mixed.save_pretrained(tmp_path / "mixed")
    again = DDMPipeline.from_pretrained(tmp_path / "mixed")
    assert torch.equal(again([1, 2], FULL, [0, 1]).latents, mixed([1, 2], FULL, [0, 1]).latents)
    assert not torch.equal(again([1, 2], FULL, [0, 1]).latents, whole([1, 2], FULL, [0, 1]).latents)
    assert RowFlops.of(again).experts == RowFlops.of(whole).experts
    write_json(tmp_path / "mixed" / "expert_1" / TIME_SPLIT, {"bounds": "x"})
    with pytest.raises(CorruptArtifact, match="no schedule"):
        DDMPipeline.from_pretrained(tmp_path / "mixed")
