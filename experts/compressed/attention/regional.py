"""Attention to the tokens of a region and to a summary of every other one, instead of to all tokens of a map.

    y_i = sum_j softmax_j(q_i k_j / sqrt(width) + b_j) v_j
    j runs over the n tokens of i's region (b = 0), the summaries of the other regions (b = log n), and texts (b = 0)
    summary of a region: k = sum_m a_m k_m, v = sum_m c_m v_m,    a, c = softmax of logits of a head, 1 / n at first

A query reads n + N / n keys instead of N. The bias lets a summary count as the n tokens that it stands for, so nothing
changes where the keys of a region are equal; one region, and regions of one token, are plain attention. A-SDM speeds up
attention in layers of large maps by a global-regional interactive one (Zhu et al. 2023, arXiv:2312.15516), which is
known by its abstract alone: the equation is ours.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from experts.compressed.attention.calls import AttentionCalls

Query = Float[Tensor, "batch head token width"]
Regions = Float[Tensor, "batch head region member width"]

NAME = "regional"
"""Name of the summary in the attention layer that it changes."""
ACTIVE = "active_regional"
"""Name of the attribute that holds the `AttentionCalls` of a running call."""
IMAGE_FIRST = ("AttnProcessor", "AttnProcessor2_0", "JointAttnProcessor2_0")
"""diffusers' processors whose tokens are those of the image, row by row, and then those of a text."""


class RegionalSummary(nn.Module):
    """The logits of the summaries of one attention layer, and its attention to regions and summaries."""

    KIND: ClassVar[str] = NAME

    def __init__(self, heads: int, height: int, width: int, region: int) -> None:
        """Take a map of height x width tokens in squares of side `region`; raise `ValueError` if they do not fit."""
        super().__init__()
        if region < 1 or height % region or width % region:
            raise ValueError(f"regions of side {region} do not divide a map of {height} x {width} tokens")
        self.shape = (heads, height, width, region)
        self.key_logits = nn.Parameter(torch.zeros(heads, region**2))
        self.value_logits = nn.Parameter(torch.zeros(heads, region**2))

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return dict(zip(("heads", "height", "width", "region"), self.shape, strict=True))

    def keep_heads(self, heads: Sequence[int]) -> None:
        """Keep the logits of these heads only, in place."""
        self.shape = (len(heads), *self.shape[1:])
        for name in ("key_logits", "value_logits"):
            logits = self.get_parameter(name)
            setattr(self, name, nn.Parameter(logits.detach()[list(heads)], requires_grad=logits.requires_grad))

    def to_regions(self, tokens: Query) -> Regions:
        """Return the tokens of a map by their regions."""
        _, height, width, side = self.shape
        squares = tokens.reshape(*tokens.shape[:2], height // side, side, width // side, side, -1).transpose(3, 4)
        return squares.flatten(4, 5).flatten(2, 3)

    def to_map(self, regions: Regions) -> Query:
        """Return the tokens of regions in the order of the map."""
        _, height, width, side = self.shape
        squares = regions.reshape(*regions.shape[:2], height // side, width // side, side, side, -1)
        return squares.transpose(3, 4).flatten(2, 5)

    def forward(
        self,
        query: Query,
        key: Query,
        value: Query,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Query:
        """Return the attention of every token; those behind the map, of a text, read all keys.

        Raises `ValueError` for fewer tokens than the map has, and for a mask, dropout or grouped heads.
        """
        _, height, width, side = self.shape
        count, members = height * width, side**2
        if attn_mask is not None or dropout_p or is_causal or enable_gqa or query.shape != key.shape:
            raise ValueError("attention by regions takes no mask, dropout, or keys of other tokens; remove the stage")
        if query.shape[2] < count:
            raise ValueError(
                f"this attention was divided for maps of {height} x {width} tokens and got {query.shape[2]} in all; "
                "sample at the size of the training"
            )
        parts = [self.to_regions(part[:, :, :count]) for part in (query, key, value)]
        summaries = [
            (part * logits.softmax(-1)[:, None, :, None]).sum(3)
            for part, logits in ((parts[1], self.key_logits), (parts[2], self.value_logits))
        ]
        regions = count // members
        keys, values = (
            torch.cat([own, *(_repeat(tokens, regions) for tokens in (summary, part[:, :, count:]))], dim=3)
            for own, summary, part in zip(parts[1:], summaries, (key, value), strict=True)
        )
        bias = self.bias(keys.shape[3]).to(query)
        attended = functional.scaled_dot_product_attention(
            parts[0].flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), attn_mask=bias, scale=scale
        )
        result = self.to_map(attended.reshape(parts[0].shape))
        if query.shape[2] == count:
            return result
        texts = functional.scaled_dot_product_attention(query[:, :, count:], key, value, scale=scale)
        return torch.cat([result, texts], dim=2)

    def bias(self, keys: int) -> Float[Tensor, "region one key"]:
        """Return b of every region and key: log n for summaries, minus infinity for a region's own."""
        members = self.shape[3] ** 2
        regions = self.shape[1] * self.shape[2] // members
        bias = self.key_logits.new_zeros(regions, keys)
        bias[:, members : members + regions] = math.log(members)
        bias[:, members : members + regions].fill_diagonal_(-torch.inf)
        return bias[:, None]


def _repeat(tokens: Query, regions: int) -> Regions:
    """Return the same tokens for every region."""
    return tokens[:, :, None].expand(-1, -1, regions, -1, -1)


def attention_maps(
    model: nn.Module, run: Callable[[], object], aspect: tuple[int, int]
) -> dict[str, tuple[int, int, int]]:
    """Return heads, height and width of the maps of every self-attention, by its path, as they are in `run`.

    Layers whose tokens are no map of this aspect (height, width), or come behind those of a text, are left out.
    """
    found: dict[str, tuple[int, int, int]] = {}
    handles = []
    for path, layer in model.named_modules():
        if type(getattr(layer, "processor", None)).__name__ in IMAGE_FIRST:
            enter = partial(_enter_recording, path=path, aspect=aspect, found=found)
            handles += [
                layer.register_forward_pre_hook(enter, with_kwargs=True),
                layer.register_forward_hook(_leave, always_call=True),
            ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {path: found[path] for path, _ in model.named_modules() if path in found}


def _enter_recording(
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    path: str,
    aspect: tuple[int, int],
    found: dict[str, tuple[int, int, int]],
) -> None:
    """Let the running call of a layer add it to `found` if it attends to a map."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    count = hidden.shape[1] if hidden.ndim == 3 else math.prod(hidden.shape[2:])
    factor = math.gcd(*aspect)
    sides = [(aspect[0] // factor * k, aspect[1] // factor * k) for k in range(1, factor + 1)]
    fitting = [side for side in sides if math.prod(side) == count]

    def attend(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        if fitting and query.shape == key.shape and settings.get("attn_mask") is None:
            found[path] = (query.shape[1], *fitting[0])
        attended: Tensor = functional.scaled_dot_product_attention(query, key, value, **settings)
        return attended

    _start(layer, attend)


def add_regional_summary(model: nn.Module, path: str, settings: Mapping[str, Any]) -> None:
    """Let the attention layer above `path` attend to regions and summaries, in place.

    Raises `ValueError` if the path ends otherwise, or the layer is of another kind.
    """
    parent, _, name = path.rpartition(".")
    layer = model.get_submodule(parent)
    processor = type(getattr(layer, "processor", None)).__name__
    if name != NAME or hasattr(layer, NAME) or processor not in IMAGE_FIRST:
        raise ValueError(f"{path} is no summary of regions in an attention layer of diffusers with {IMAGE_FIRST}")
    summary = RegionalSummary(**{key: int(value) for key, value in settings.items()})
    layer.add_module(NAME, summary.to(next(layer.parameters())))
    layer.register_forward_pre_hook(_enter)
    layer.register_forward_hook(_leave, always_call=True)


def _enter(layer: nn.Module, args: tuple[Any, ...]) -> None:
    _start(layer, layer.get_submodule(NAME))


def _start(layer: nn.Module, attend: Callable[..., Tensor]) -> None:
    """Replace torch's attention until the call of the layer ends."""
    calls = AttentionCalls(attend)
    setattr(layer, ACTIVE, calls)
    calls.__enter__()  # type: ignore[no-untyped-call]


def _leave(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    calls: AttentionCalls = getattr(layer, ACTIVE)
    calls.__exit__(None, None, None)  # type: ignore[no-untyped-call]
    delattr(layer, ACTIVE)
    if output is not None and not calls.calls:
        raise RuntimeError("the attention of a divided layer was not torch's; set the attention backend to native")
