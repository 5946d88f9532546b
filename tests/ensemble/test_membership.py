"""Experts leave, come back and join, and everyone else stays as they were."""

import pytest
import torch

from ensemble.config import SamplingConfig
from ensemble.membership import with_expert_back, with_new_expert, without_experts
from ensemble.pipeline import DDMPipeline, PipelineError
from experts.condition import Condition
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from router.config import RouterConfig, SelectionConfig
from router.models.registry import build_router
from router.router import Router
from tests.ensemble.test_pipeline import SHAPE, make_expert, parts, put_together

__all__ = ["parts"]
FULL = SamplingConfig(steps=3, selection=SelectionConfig(name="full"))


def gates(pipeline: DDMPipeline) -> torch.Tensor:
    noised = torch.randn(20, *SHAPE, generator=torch.Generator().manual_seed(1))
    null, ensemble = Condition.null(20), pipeline.ensemble
    return ensemble.gates(noised, torch.full((20,), 0.5), null, ensemble.init_routing(range(20), null, FULL.selection))


def test_who_leaves_is_silent_and_the_others_share_its_gates(parts, tmp_path):
    whole = put_together(parts)
    left = without_experts(whole, [1])
    assert left.ensemble.missing == (1,) and whole.ensemble.missing == ()
    kept = gates(whole) * torch.tensor([1.0, 0.0, 1.0])
    torch.testing.assert_close(gates(left), kept / kept.sum(1, keepdim=True))
    left.save_pretrained(tmp_path / "left")
    again = DDMPipeline.from_pretrained(tmp_path / "left")
    assert not (tmp_path / "left" / "expert_1").exists()
    assert torch.equal(again([3, 4], FULL).latents, left([3, 4], FULL).latents)


def test_who_comes_back_makes_the_ensemble_whole_again(parts):
    whole = put_together(parts)
    back = with_expert_back(without_experts(whole, [1, 2]), Expert.load(parts / "trained_2"), 2)
    back = with_expert_back(back, Expert.load(parts / "trained_1"), 1)
    assert torch.equal(back([3, 4], FULL).latents, whole([3, 4], FULL).latents)


def test_who_joins_is_the_last_and_the_others_keep_their_ids(parts):
    whole = put_together(parts)
    counts = torch.ones(3, 4, dtype=torch.float64)
    model = build_router(RouterConfig(width=8, depth=1), SHAPE, 4, 2)
    more = with_new_expert(
        whole, Expert.load(parts / "trained_0"), Router(model=model, noise_schedule=RECTIFIED_FLOW, prior_counts=counts)
    )
    assert sorted(more.ensemble.experts) == [0, 1, 2, 3] and more.ensemble.experts[3].cluster_id == 3
    assert all(more.ensemble.experts[k] is whole.ensemble.experts[k] for k in range(3))
    assert whole.ensemble.num_experts == 3


def test_a_router_that_does_not_know_the_new_one_is_refused(parts):
    whole = put_together(parts)
    with pytest.raises(PipelineError, match="know the 3 experts and the new one; it knows 3"):
        with_new_expert(whole, Expert.load(parts / "trained_0"), whole.ensemble.router)


@pytest.mark.parametrize(
    ("ids", "message"),
    [([3], r"among \[0, 1, 2\], which are there; got \[3\]"), ([0, 1, 2], "leave one in it")],
)
def test_who_is_not_there_cannot_leave_and_one_must_stay(parts, ids, message):
    with pytest.raises(PipelineError, match=message):
        without_experts(put_together(parts), ids)


@pytest.mark.parametrize(("removed", "message"), [([1], r"missing are \[1\]; got place 2"), ([], "none is missing")])
def test_a_place_must_be_a_missing_one(parts, removed, message):
    pipeline = without_experts(put_together(parts), removed)
    with pytest.raises(PipelineError, match=message):
        with_expert_back(pipeline, Expert.load(parts / "trained_2"), 2)


def test_an_expert_of_other_classes_does_not_fit(parts, tmp_path):
    other = Expert.load(make_expert(tmp_path / "other", 1, num_classes=5))
    with pytest.raises(PipelineError, match="must know the ensemble's latents and classes"):
        with_expert_back(without_experts(put_together(parts), [1]), other, 1)
