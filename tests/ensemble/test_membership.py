"""Remove, restore and add experts; all others stay unchanged."""

import pytest
import torch

from ensemble.config import SamplingConfig
from ensemble.membership import add_expert, remove_experts, restore_expert
from ensemble.pipeline import EnsemblePipeline
from ensemble.pipeline_folder import PipelineError
from experts.conditions.condition import Condition
from experts.conditions.null_text import set_null_text
from experts.conditions.text_embedding import TextEmbedding
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from router.config import RouterConfig, SelectionConfig
from router.models.registry import build_router
from router.router import Router
from tests.ensemble.test_pipeline import SHAPE, make_expert, parts, put_together

__all__ = ["parts"]
FULL = SamplingConfig(steps=3, selection=SelectionConfig(name="full"))


def gates(pipeline: EnsemblePipeline) -> torch.Tensor:
    noised = torch.randn(20, *SHAPE, generator=torch.Generator().manual_seed(1))
    null, ensemble = Condition.null(20), pipeline.ensemble
    return ensemble.gates(noised, torch.full((20,), 0.5), null, ensemble.init_routing(range(20), null, FULL.selection))


def test_removed_expert_has_zero_gates(parts, tmp_path):
    original = put_together(parts)
    reduced = remove_experts(original, [1])
    assert reduced.ensemble.missing == (1,) and original.ensemble.missing == ()
    remaining = gates(original) * torch.tensor([1.0, 0.0, 1.0])
    torch.testing.assert_close(gates(reduced), remaining / remaining.sum(1, keepdim=True))
    reduced.save_pretrained(tmp_path / "reduced")
    again = EnsemblePipeline.from_pretrained(tmp_path / "reduced")
    assert not (tmp_path / "reduced" / "expert_1").exists()
    assert torch.equal(again([3, 4], FULL).latents, reduced([3, 4], FULL).latents)


def test_restored_experts_give_the_original_samples(parts):
    original = put_together(parts)
    restored = restore_expert(remove_experts(original, [1, 2]), Expert.load(parts / "trained_2"), 2)
    restored = restore_expert(restored, Expert.load(parts / "trained_1"), 1)
    assert torch.equal(restored([3, 4], FULL).latents, original([3, 4], FULL).latents)


def test_added_expert_gets_the_next_id(parts):
    original = put_together(parts)
    counts = torch.ones(3, 4, dtype=torch.float64)
    model = build_router(RouterConfig(width=8, depth=1), SHAPE, 4, 2)
    extended = add_expert(
        original,
        Expert.load(parts / "trained_0"),
        Router(model=model, noise_schedule=RECTIFIED_FLOW, prior_counts=counts),
    )
    assert sorted(extended.ensemble.experts) == [0, 1, 2, 3] and extended.ensemble.experts[3].cluster_id == 3
    assert all(extended.ensemble.experts[k] is original.ensemble.experts[k] for k in range(3))
    assert original.ensemble.num_experts == 3


def test_add_expert_with_old_router_raises(parts):
    original = put_together(parts)
    with pytest.raises(PipelineError, match="have the 3 experts and the new one; it has 3"):
        add_expert(original, Expert.load(parts / "trained_0"), original.ensemble.router)


def test_expert_of_other_texts_is_refused(parts):
    expert, text = Expert.load(parts / "trained_0"), TextEmbedding.zeros(4, 6, 6)
    set_null_text(expert.model, text)
    with pytest.raises(PipelineError, match=r"must read the ensemble's texts.* None; this one has \(4, 6, 6\)"):
        restore_expert(remove_experts(put_together(parts), [0]), expert, 0)


@pytest.mark.parametrize(
    ("ids", "message"),
    [([3], r"among \[0, 1, 2\]; got \[3\]"), ([0, 1, 2], "leave one in it")],
)
def test_remove_experts_that_are_absent_or_all_raises(parts, ids, message):
    with pytest.raises(PipelineError, match=message):
        remove_experts(put_together(parts), ids)


@pytest.mark.parametrize(("removed", "message"), [([1], r"missing are \[1\]; got place 2"), ([], "none is missing")])
def test_restore_expert_that_is_present_raises(parts, removed, message):
    pipeline = remove_experts(put_together(parts), removed)
    with pytest.raises(PipelineError, match=message):
        restore_expert(pipeline, Expert.load(parts / "trained_2"), 2)


def test_restore_expert_of_other_classes_raises(parts, tmp_path):
    other = Expert.load(make_expert(tmp_path / "other", 1, num_classes=5))
    with pytest.raises(PipelineError, match="must have the ensemble's latents and classes"):
        restore_expert(remove_experts(put_together(parts), [1]), other, 1)
