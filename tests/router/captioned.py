"""Latents with one caption each, whose pooled vector is given."""

import torch

from experts.conditions.captions import EncodedCaptions
from experts.conditions.text_embedding import TextEmbedding
from experts.training.latent_dataset import LatentDataset

WIDTH = 5


def make_dataset(pooled: torch.Tensor, cluster_id: torch.Tensor, class_id: torch.Tensor | None = None) -> LatentDataset:
    """Give every sample one caption of one token with this pooled vector."""
    count = len(pooled)
    null_text = TextEmbedding(
        torch.zeros(1, 2, 1), torch.tensor([[True, False]]), torch.zeros(1, WIDTH), torch.tensor([True])
    )
    captions = EncodedCaptions(
        token_features=torch.zeros(count, 1),
        first_token=torch.arange(count + 1),
        pooled=pooled,
        weight=torch.ones(count),
        first_caption=torch.arange(count + 1),
        null_text=null_text,
    )
    return LatentDataset(
        clean=torch.zeros(count, 2),
        class_id=torch.full((count,), -1) if class_id is None else class_id,
        cluster_id=cluster_id,
        captions=captions,
    )
