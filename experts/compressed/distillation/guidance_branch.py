"""A branch for the negative condition: what guidance adds to a velocity, from one call of a network instead of two.

Every layer of attention and of features (SpeedUpNet, Chai et al. 2023, arXiv:2312.08887) gets a `GuidanceBranch`, a
child whose output is added to the layer's. Its hidden features attend to the negative condition and the condition:

    (w - 1) outer((1 + b) silu(inner(n) + a)),   (a, b) = level(w - 1, t) + attention(query(n), both)

n is the layer's normalized output. The factor w - 1 is that of guidance, v + (w - 1) (v - v_negative): without guidance
the network is that without branches, bit for bit. A branch reads no parameter of the network, so it fits every network
of equal shapes.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from experts.conditions.condition import Condition
from experts.types import RowTimes

FREQUENCIES = 5
"""Octaves of t, from a quarter of a turn."""
NAME = "guidance"
"""Name of a branch in the layer that it extends."""
LAYERS, BLOCKS = re.compile(r"(.*\.)?(attn\d?|attention|ff)"), ("ResnetBlock2D", "ResidualBlock")
"""Layers that get one: attention and features of transformers by path, blocks of U-Nets and MLPs by class."""
OUTPUTS = ("norm", "norm_out", "conv_norm_out")
"""Last norms, which get one too: after them nothing bounds the size of a prediction, and guidance makes it larger."""


class GuidanceBranch(nn.Module):
    """What the negative condition and the guidance scale add to the output of one layer."""

    KIND: ClassVar[str] = NAME

    def __init__(self, features: int, rank: int, num_classes: int, text_width: int, pooled_width: int) -> None:
        """Initialize the last layer with zeros; a width of 0 is a condition without that part."""
        super().__init__()
        self.shape = (features, rank, num_classes, text_width, pooled_width)
        self.given: tuple[Condition, RowTimes] | None = None
        self.signs, self.classes = nn.Embedding(2, rank), nn.Embedding(num_classes + 1, rank)
        self.text = nn.Linear(text_width, rank) if text_width else None
        self.pooled = nn.Linear(pooled_width, rank) if pooled_width else None
        self.query, self.inner = nn.Linear(features, rank), nn.Linear(features, rank)
        self.key, self.value = nn.Linear(rank, rank), nn.Linear(rank, 2 * rank)
        self.level = nn.Linear(1 + 2 * FREQUENCIES, 2 * rank)
        self.outer = nn.Linear(rank, features)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return dict(zip(("features", "rank", "num_classes", "text_width", "pooled_width"), self.shape, strict=True))

    def tokens(
        self, part: Condition, sign: int
    ) -> tuple[Float[Tensor, "batch token rank"], Bool[Tensor, "batch token"]]:
        """Return the tokens of a condition, negative (0) or not (1), and which of them are no padding."""
        tokens = [self.classes(part.embedding_index(self.shape[2]))[:, None]]
        used = [torch.ones_like(tokens[0][..., 0], dtype=torch.bool)]
        if self.pooled is not None and part.text is not None:
            tokens.append(self.pooled(part.text.pooled.to(tokens[0]))[:, None])
            used.append(used[0])
        if self.text is not None and part.text is not None:
            tokens.append(self.text(part.text.sequence.to(tokens[0])))
            used.append(part.text.mask)
        return torch.cat(tokens, dim=1) + self.signs.weight[sign], torch.cat(used, dim=1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the layer's output of shape (batch, *token, features), or of maps, plus the branch."""
        if self.given is None or (guidance := self.given[0].guidance) is None:
            return hidden
        (scale, negative), (condition, t) = guidance, self.given
        features = self.shape[0]
        is_map = hidden.ndim == 4 and hidden.shape[1] == features
        flat = (hidden.movedim(1, -1) if is_map else hidden).reshape(len(hidden), -1, features)
        normed, strength = functional.layer_norm(flat, (features,)), (scale.to(flat) - 1)[:, None, None]
        tokens, used = map(
            partial(torch.cat, dim=1), zip(self.tokens(negative, 0), self.tokens(condition, 1), strict=True)
        )
        octaves = 2.0 ** torch.arange(FREQUENCIES, device=flat.device, dtype=flat.dtype) * (math.pi / 2)
        angles = t.to(flat)[:, None, None] * octaves
        level = self.level(torch.cat([strength, angles.sin(), angles.cos()], dim=-1))
        attended = functional.scaled_dot_product_attention(
            self.query(normed), self.key(tokens), self.value(tokens), attn_mask=used[:, None, :]
        )
        shift, gain = (level + attended).chunk(2, dim=-1)
        added = strength * self.outer((1 + gain) * functional.silu(self.inner(normed) + shift))
        extended: Tensor = flat + added
        if is_map:
            extended = extended.reshape(len(hidden), *hidden.shape[2:], features).movedim(-1, 1)
        return extended.reshape(hidden.shape)


def add_guidance_branch(model: nn.Module, path: str, settings: Mapping[str, Any]) -> None:
    """Attach a branch as `path`, a child of a layer, in place.

    Raises `ValueError` if the path ends otherwise or the settings are not those of a branch.
    """
    parent, _, name = path.rpartition(".")
    layer = model.get_submodule(parent)
    if name != NAME or settings.keys() != set(("features", "rank", "num_classes", "text_width", "pooled_width")):
        raise ValueError(f"{path} with {dict(settings)} is no branch of guidance")
    layer.add_module(NAME, GuidanceBranch(**settings).to(next(model.parameters()).device))
    layer.register_forward_hook(_add_branch)


def extend_by_guidance(model: nn.Module, rank: int, num_classes: int, text_width: int, pooled_width: int) -> list[str]:
    """Attach a branch to every layer of attention and features, in place; return their paths.

    The branches come from torch's global generator and change nothing until they are trained.
    """
    added = []
    for path, module in [*model.named_modules()]:
        if features := _count_features(path, module):
            settings = {"features": features, "rank": rank, "num_classes": num_classes}
            settings |= {"text_width": text_width, "pooled_width": pooled_width}
            add_guidance_branch(model, f"{path}.{NAME}", settings)
            added.append(f"{path}.{NAME}")
    return added


def copy_branches(source: nn.Module, model: nn.Module) -> nn.Module:
    """Attach the branches of another network of equal shapes, in place; return the network."""
    for path, branch in guidance_branches(source).items():
        add_guidance_branch(model, path, branch.settings())
        model.get_submodule(path).load_state_dict(branch.state_dict())
    return model


def guidance_branches(model: nn.Module) -> dict[str, GuidanceBranch]:
    """Return the branches of a network by their paths."""
    return {path: module for path, module in model.named_modules() if isinstance(module, GuidanceBranch)}


def _count_features(path: str, layer: nn.Module) -> int:
    """Return the features of the output of a layer that gets a branch; 0 for any other layer."""
    if path in OUTPUTS and isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[-1]
    if path in OUTPUTS and isinstance(layer, nn.GroupNorm):
        return layer.num_channels
    if not LAYERS.fullmatch(path) and type(layer).__name__ not in BLOCKS:
        return 0
    last = [part for part in layer.modules() if isinstance(part, nn.Linear | nn.Conv2d)][-1:]
    return sum(part.out_features if isinstance(part, nn.Linear) else part.out_channels for part in last)


@contextmanager
def guiding(model: nn.Module, condition: Condition, t: RowTimes) -> Iterator[None]:
    """Let the branches of a network see t and the guidance of a condition within the context, if it has one."""
    branches = [] if condition.guidance is None else [*guidance_branches(model).values()]
    for branch in branches:
        branch.given = condition, t
    try:
        yield
    finally:
        for branch in branches:
            branch.given = None


def _add_branch(layer: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
    branch = layer.get_submodule(NAME)
    if isinstance(output, tuple):
        return (branch(output[0]), *output[1:])
    return branch(output)
