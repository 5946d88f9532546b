"""A second time for a network of one: the length of the jump from t, embedded and added to the embedding of t.

A mean flow (Geng et al. 2025, arXiv:2505.13447) predicts the average velocity from t to an earlier time. An
`IntervalEmbedding` is a child of the layers that embed t in a published network. It starts at zero, so the network
starts as the expert that it was made from. Without an interval the jump has no length, and the average is the velocity.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from experts.types import RowTimes

NAME = "interval"
"""Name of the embedding in the layers that it extends."""
FREQUENCIES = 5
"""Octaves from half a turn over the longest interval; higher ones would drown the derivative by t."""


class IntervalEmbedding(nn.Module):
    """Embedding of a jump's length, in [0, 1]."""

    KIND: ClassVar[str] = NAME

    def __init__(self, width: int) -> None:
        """Initialize the last layer with zeros."""
        super().__init__()
        self.length: RowTimes | None = None
        self.inner = nn.Linear(2 * FREQUENCIES, width)
        self.outer = nn.Linear(width, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def settings(self) -> dict[str, Any]:
        """Return nothing: its width is that of the layers that it extends."""
        return {}

    def forward(self, embedding: Float[Tensor, "batch *token width"]) -> Float[Tensor, "batch *token width"]:
        """Return the embedding of t plus that of the interval."""
        length = embedding.new_zeros(len(embedding)) if self.length is None else self.length.to(embedding.dtype)
        octaves = 2.0 ** torch.arange(FREQUENCIES, device=embedding.device, dtype=embedding.dtype)
        angles = length[:, None] * octaves * (math.pi / 2)
        added = self.outer(nn.functional.silu(self.inner(torch.cat([angles.sin(), 1 - angles.cos()], dim=1))))
        extended: Tensor = embedding + added.reshape(len(embedding), *[1] * (embedding.ndim - 2), -1)
        return extended


def add_interval_embedding(model: nn.Module, path: str, settings: Mapping[str, Any] | None = None) -> None:
    """Attach an embedding as `path`, a child of the layers that embed t, in place.

    Raises `ValueError` if the path ends otherwise, and if the layers have no linear one.
    """
    parent, _, name = path.rpartition(".")
    layers = model.get_submodule(parent)
    linear = [layer for layer in layers.modules() if isinstance(layer, nn.Linear)]
    if name != NAME or settings or not linear:
        raise ValueError(f"{path} with {dict(settings or {})} is no embedding of an interval beside linear layers")
    layers.add_module(NAME, IntervalEmbedding(linear[-1].out_features).to(linear[-1].weight))
    layers.register_forward_hook(_add_interval)


@contextmanager
def jumping(model: nn.Module, length: RowTimes | None) -> Iterator[None]:
    """Let the network predict the average over jumps of these lengths within the context; None changes nothing."""
    embeddings = [] if length is None else [part for part in model.modules() if isinstance(part, IntervalEmbedding)]
    for embedding in embeddings:
        embedding.length = length
    try:
        yield
    finally:
        for embedding in embeddings:
            embedding.length = None


def _add_interval(layers: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
    extended: Tensor = layers.get_submodule(NAME)(output)
    return extended
