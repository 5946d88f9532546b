"""A head that predicts the anchor from a text: its loss, its optimum, and drafts under prompts."""

from dataclasses import replace

import pytest
import torch

from benchmarks.arms.paper_networks import select_digits
from ddm_core.artifacts import Workspace
from ensemble.compression.acceleration.config import TruncateConfig
from ensemble.compression.acceleration.truncated_start import fit_anchors, train_confidence
from ensemble.compression.method import StageError
from ensemble.multi_network_experts import TruncatedExpert
from ensemble.solvers import make_noise
from experts.architectures.draft_generators import PromptedAnchors
from experts.compressed.caching.feature_cache import ExpertCache
from experts.conditions.condition import Condition
from experts.conditions.text_embedding import TextEmbedding
from experts.config import ResidualMLPConfig, TrainingConfig
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.registry import build_network

CONFIG = TruncateConfig(
    anchors=12, width=32, training=TrainingConfig(steps=300, batch_size=128, lr=5e-3, warmup_steps=10)
)
DATA = select_digits("mmdit", held_out=False)
LABELS = select_digits("dit", held_out=False).class_id
ANCHORS = fit_anchors(DATA, 0, CONFIG)
CLASSES = fit_anchors(select_digits("dit", held_out=False), 10, CONFIG)


def texts_of_classes():
    """Return the condition of one row of each class."""
    return DATA.condition(torch.stack([(k == LABELS).nonzero()[0, 0] for k in range(10)]))


def shares(anchors, condition):
    confidence = anchors.logits(condition.embedding_index(0), condition.text).sigmoid()
    return (confidence / confidence.sum(1, keepdim=True)).detach()


@pytest.fixture(scope="module")
def trained_head(tmp_path_factory):
    return train_confidence(ANCHORS, DATA, CONFIG, Workspace.at(tmp_path_factory.mktemp("head")))


def test_before_training_texts_have_the_shares_of_the_cluster():
    head = PromptedAnchors.from_anchors(ANCHORS, (10, 10), 16)
    for row in shares(head, texts_of_classes()):
        torch.testing.assert_close(row, ANCHORS.shares[-1], atol=1e-4, rtol=1e-3)


def test_the_loss_is_the_cross_entropy_of_the_nearest_anchor():
    torch.manual_seed(0)
    head = PromptedAnchors.from_anchors(ANCHORS, (10, 10), 16)
    torch.nn.init.normal_(head.out.weight)
    condition, clean = texts_of_classes(), DATA.clean[:10]
    confidence = head.logits(condition.embedding_index(0), condition.text).sigmoid()
    total = 0.0
    for row in range(10):
        distances = [(clean[row] - mean).norm() for mean in head.means]
        nearest = distances.index(min(distances))
        total -= sum(torch.log(s if k == nearest else 1 - s) for k, s in enumerate(confidence[row]))
    loss = head.loss(clean, condition.embedding_index(0), condition.text)
    torch.testing.assert_close(loss, total / 10, rtol=1e-4, atol=1e-5)


def test_the_trained_head_has_the_shares_of_each_class(trained_head):
    head, flops = trained_head
    found, exact = shares(head, texts_of_classes()), CLASSES.shares[:10]
    distance = (found - exact).abs().sum(1) / 2
    assert float(distance.mean()) < 0.15 and flops > 0
    assert float((ANCHORS.shares[-1] - exact).abs().sum(1).mean() / 2) > 0.5
    none = shares(head, Condition.null(1))
    assert float((none - ANCHORS.shares[-1]).abs().sum() / 2) < 0.3, "dropped texts are the cluster"


def test_the_null_text_and_padding_change_nothing(trained_head):
    head, text = trained_head[0], texts_of_classes().text
    index = torch.zeros(10, dtype=torch.int64)
    padded = TextEmbedding(
        torch.cat([text.sequence, torch.randn(10, 2, 10)], 1),
        torch.cat([text.mask, torch.zeros(10, 2, dtype=torch.bool)], 1),
        text.pooled,
        text.is_null,
    )
    torch.testing.assert_close(head.logits(index, padded), head.logits(index, text))
    filled = text.drop(torch.ones(10, dtype=torch.bool)).fill_null(
        TextEmbedding(
            torch.randn(1, *text.shape[:1], 10),
            torch.ones(1, text.shape[0], dtype=torch.bool),
            torch.randn(1, 10),
            torch.ones(1, dtype=torch.bool),
        )
    )
    torch.testing.assert_close(head.logits(index, filled), head.logits(index, None))


def test_drafts_follow_the_prompt_after_a_load_and_alone(trained_head, tmp_path):
    model = build_network(ResidualMLPConfig(width=16, depth=1), (1, 8, 8), 0, DATA.null_text)
    refiner = Expert(
        model=model,
        prediction="velocity",
        noise_schedule=RECTIFIED_FLOW,
        latent_shape=(1, 8, 8),
        num_classes=0,
        cluster_id=0,
        few_step=FewStepSchedule.uniform(2, "euler", start=0.5),
    )
    TruncatedExpert(draft=trained_head[0], refiner=refiner).save(tmp_path)
    loaded = TruncatedExpert.load(tmp_path)
    condition = texts_of_classes()

    def drafts(rows):
        noise = lambda occasion: make_noise(rows, (1, 8, 8), occasion)  # noqa: E731
        return loaded.sample_draft(noise, condition.rows(torch.tensor(rows)), ExpertCache(name=""))

    together = drafts(list(range(10)))
    assert all(torch.equal(drafts([row])[0], together[row]) for row in range(10))
    many = Condition(condition.class_id[:1].expand(400), condition.text.rows(torch.zeros(400, dtype=torch.int64)))
    same = loaded.sample_draft(lambda k: make_noise(range(400), (1, 8, 8), k), many, ExpertCache(name=""))
    nearest = torch.cdist(same.flatten(1), ANCHORS.means.flatten(1)).argmin(1)
    counts = torch.bincount(nearest, minlength=12) / 400
    assert float((counts - CLASSES.shares[0]).abs().sum() / 2) < 0.2
    assert loaded.call_flops(RECTIFIED_FLOW).mean > 0


def test_a_head_needs_captions(tmp_path):
    with pytest.raises(StageError, match="needs latents with captions"):
        train_confidence(ANCHORS, replace(DATA, captions=None), CONFIG, Workspace.at(tmp_path))
