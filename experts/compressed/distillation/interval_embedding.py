"""Inputs of a mean flow beside t: the length of the jump and a guidance scale, added to the embedding of t.

A mean flow (Geng et al. 2025, arXiv:2505.13447) predicts the average velocity from t to an earlier time. An
`IntervalEmbedding` is a child of the layers that embed t in a published network. It starts at zero, so the network
starts as the expert that it was made from. Without an interval the jump has no length, and the average is the velocity.
The guidance scale w (iMF, Geng et al. 2025, arXiv:2512.02012) enters as log w and 1 - 1 / w, which are 0 at w = 1:
there the network is that without guidance, bit for bit.
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
    """Embedding of a jump's length, in [0, 1], and of a guidance scale of at least 1."""

    KIND: ClassVar[str] = NAME

    def __init__(self, width: int, *, has_guidance: bool = False) -> None:
        """Initialize the last layer with zeros."""
        super().__init__()
        self.length: RowTimes | None = None
        self.guidance: RowTimes | None = None
        self.scale = nn.Linear(2, width, bias=False) if has_guidance else None
        self.inner = nn.Linear(2 * FREQUENCIES, width)
        self.outer = nn.Linear(width, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def settings(self) -> dict[str, Any]:
        """Return whether it has guidance: its width is that of the layers that it extends."""
        return {"has_guidance": True} if self.scale is not None else {}

    def forward(self, embedding: Float[Tensor, "batch *token width"]) -> Float[Tensor, "batch *token width"]:
        """Return the embedding of t plus that of the interval and the guidance."""
        length = embedding.new_zeros(len(embedding)) if self.length is None else self.length.to(embedding.dtype)
        octaves = 2.0 ** torch.arange(FREQUENCIES, device=embedding.device, dtype=embedding.dtype)
        angles = length[:, None] * octaves * (math.pi / 2)
        hidden = self.inner(torch.cat([angles.sin(), 1 - angles.cos()], dim=1))
        if self.scale is not None and self.guidance is not None:
            w = self.guidance.to(embedding.dtype)
            hidden = hidden + self.scale(torch.stack([w.log(), 1 - 1 / w], dim=1))
        added = self.outer(nn.functional.silu(hidden))
        extended: Tensor = embedding + added.reshape(len(embedding), *[1] * (embedding.ndim - 2), -1)
        return extended


def add_interval_embedding(model: nn.Module, path: str, settings: Mapping[str, Any] | None = None) -> None:
    """Attach an embedding as `path`, a child of the layers that embed t, in place.

    Raises `ValueError` if the path ends otherwise, and if the layers have no linear one.
    """
    parent, _, name = path.rpartition(".")
    layers = model.get_submodule(parent)
    linear = [layer for layer in layers.modules() if isinstance(layer, nn.Linear)]
    settings = dict(settings or {})
    if name != NAME or settings not in ({}, {"has_guidance": True}) or not linear:
        raise ValueError(f"{path} with {settings} is no embedding of an interval beside linear layers")
    layers.add_module(NAME, IntervalEmbedding(linear[-1].out_features, **settings).to(linear[-1].weight))
    layers.register_forward_hook(_add_interval)


@contextmanager
def jumping(model: nn.Module, length: RowTimes | None, guidance: RowTimes | None = None) -> Iterator[None]:
    """Let the network predict the average over jumps of these lengths, with these guidance scales, within the context.

    None leaves what an outer context has set.
    """
    given = {name: rows for name, rows in (("length", length), ("guidance", guidance)) if rows is not None}
    embeddings = [part for part in model.modules() if isinstance(part, IntervalEmbedding)] if given else []
    for embedding in embeddings:
        vars(embedding).update(given)
    try:
        yield
    finally:
        for embedding in embeddings:
            vars(embedding).update(dict.fromkeys(given))


def takes_guidance(model: nn.Module) -> bool:
    """Return whether the guidance scale is an input of the network."""
    return any(isinstance(part, IntervalEmbedding) and part.scale is not None for part in model.modules())


def _add_interval(layers: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
    extended: Tensor = layers.get_submodule(NAME)(output)
    return extended
