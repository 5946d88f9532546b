"""Draft generators."""

import pytest
import torch

from experts.architectures.draft_generators import DRAFT_GENERATORS, Anchors, Autoregressive
from experts.networks.model_io import load_model, save_model

NULL = torch.tensor([2])


def test_anchor_frequencies_match_class_shares():
    means = torch.arange(3.0)[:, None, None, None].expand(3, 1, 2, 2)
    shares = torch.tensor([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0], [0.6, 0.1, 0.3]])
    anchors = Anchors.from_means(means, shares)
    noise = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for class_id in range(3):
        drafts = anchors(noise, torch.full((4000,), class_id))[:, 0, 0, 0].long()
        frequencies = torch.bincount(drafts, minlength=3) / 4000
        torch.testing.assert_close(frequencies, shares[class_id], atol=0.025, rtol=0)


@pytest.mark.parametrize("shape", [(2, 4, 4), (10,)])
def test_autoregressive_draft_learns_dependent_parts(shape):
    torch.manual_seed(0)
    draft, generator = Autoregressive(list(shape), 2, 24, 4), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(draft.parameters(), 1e-2)

    def clean():
        sign = torch.randint(2, (128,), generator=generator).float().mul(2).sub(1)
        return sign.reshape(-1, *[1] * len(shape)) + 0.05 * torch.randn(128, *shape, generator=generator)

    for _ in range(250):
        loss = draft.loss(clean(), NULL.expand(128))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drafts = draft(torch.randn(400, *shape, generator=generator), NULL.expand(400)).detach()
    assert drafts.shape == (400, *shape)
    ends = drafts.flatten(1)[:, -1] * drafts.flatten(1)[:, -2]
    assert (ends > 0).float().mean() > 0.9, "adjacent entries share a sign, which the draft reproduces"
    assert 0.25 < (drafts.flatten(1)[:, -1] > 0).float().mean() < 0.75


@pytest.mark.parametrize("shape", [(2, 4, 4), (10,)])
def test_tokens_of_a_latent_are_invertible(shape):
    draft, latents = Autoregressive(list(shape), 0, 8, 4), torch.randn(3, *shape)
    assert torch.equal(draft._to_latents(draft._to_tokens(latents), latents), latents)


@pytest.mark.parametrize("draft", [Anchors([2, 4, 4], 3, 2), Autoregressive([2, 4, 4], 2, 8, 8)])
def test_loaded_draft_equals_saved_draft(draft, tmp_path):
    save_model(draft, tmp_path / "draft")
    loaded, noise = load_model(DRAFT_GENERATORS, tmp_path / "draft"), torch.randn(5, 2, 4, 4)
    assert torch.equal(loaded(noise, NULL.expand(5)), draft(noise, NULL.expand(5)))
