"""Timestep-aware quantization of what an attention layer multiplies: query, key, value and probabilities.

    Q(softmax(Q(query) Q(key)^T / sqrt(width))) Q(value)

Wang et al. 2025 (QuEST), arXiv:2402.03666: the probabilities have a grid of their own that starts at zero. Layers that
call torch's attention are covered, whatever their class; `AttentionProducts` computes that call in parts.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from experts.compressed.attention.calls import AttentionCalls
from experts.compressed.attention.regional import NAME as REGIONAL
from experts.compressed.conditional.timestep_recorder import find_recorder
from experts.compressed.quantization.activation_quant import TimestepActivationQuantizer

Query = Float[Tensor, "batch head token width"]
Key = Float[Tensor, "batch head source width"]

OPERANDS = ("query", "key", "value", "probability")
PREFIX = "timed_"
ACTIVE = "active_products"
"""Name of the attribute that holds the `AttentionProducts` of a running call."""


class AttentionProducts(AttentionCalls):
    """Passes query, key, value and probabilities of torch's attention through a function while the context lasts."""

    def __init__(self, change: Callable[[str, Tensor], Tensor]) -> None:
        """Take a function of an operand's name and its tensor, whose last axis has the channels."""
        super().__init__(self._attend)
        self.change = change

    def _attend(
        self,
        query: Query,
        key: Key,
        value: Key,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Query:
        if dropout_p or is_causal or enable_gqa:
            raise ValueError(
                "causal or grouped attention, or with dropout, cannot be rounded; set quantize.probability_bits=null"
            )
        query, key, value = (
            self.change(name, part.transpose(1, 2).flatten(2)).reshape(part.transpose(1, 2).shape).transpose(1, 2)
            for name, part in zip(OPERANDS, (query, key, value), strict=False)
        )
        scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            is_read = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if is_read else scores + attn_mask
        # A query without any key has no probabilities; torch's attention returns zeros for it.
        probabilities = scores.softmax(-1).nan_to_num(0.0)
        return self.change("probability", probabilities) @ value


class AttentionOperandQuantizer(TimestepActivationQuantizer):
    """The grids of one operand of an attention layer."""

    KIND: ClassVar[str] = "timed_attention"


def attention_layers(model: nn.Module) -> list[str]:
    """Return the paths of the attention layers, in the network's order, without those divided into regions."""
    return [
        path
        for path, module in model.named_modules()
        if type(module).__name__.endswith("Attention") and not hasattr(module, REGIONAL)
    ]


def quantize_operand(
    model: nn.Module, path: str, operand: str, grids: int, channels: int, bits: Literal[4, 8]
) -> AttentionOperandQuantizer:
    """Attach an empty quantizer to an operand of an attention layer, in place, and return it."""
    attention, name = model.get_submodule(path), PREFIX + operand
    if operand not in OPERANDS or path not in attention_layers(model) or hasattr(attention, name):
        raise ValueError(f"{path} must be an attention layer whose {operand} has no quantizer; choose another layer")
    is_first = not any(isinstance(child, AttentionOperandQuantizer) for child in attention.children())
    quantizer = AttentionOperandQuantizer(find_recorder(model), grids, bits, channels)
    attention.add_module(name, quantizer)
    if is_first:
        attention.register_forward_pre_hook(_enter)
        attention.register_forward_hook(_leave, always_call=True)
    return quantizer


def replace_with_operand_quantizer(model: nn.Module, path: str, settings: Mapping[str, Any]) -> None:
    """Put an empty quantizer at `<attention>.timed_<operand>`; raise `ValueError` if it does not fit."""
    layer, _, name = path.rpartition(".")
    if settings["bits"] not in (4, 8) or min(int(settings["grids"]), int(settings["channels"])) < 1:
        raise ValueError(f"{path} is no quantizer of {settings}")
    operand, sizes = name.removeprefix(PREFIX), (int(settings["grids"]), int(settings["channels"]))
    quantize_operand(model, layer, operand, *sizes, settings["bits"])


def _enter(attention: nn.Module, args: tuple[Any, ...]) -> None:
    def round_operand(operand: str, x: Tensor) -> Tensor:
        rounded: Tensor = attention.get_submodule(PREFIX + operand)(x)
        return rounded

    products = AttentionProducts(round_operand)
    setattr(attention, ACTIVE, products)
    products.__enter__()  # type: ignore[no-untyped-call]


def _leave(attention: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    products: AttentionProducts = getattr(attention, ACTIVE)
    products.__exit__(None, None, None)  # type: ignore[no-untyped-call]
    delattr(attention, ACTIVE)
    if output is not None and not products.calls:
        raise RuntimeError("the attention of a quantized layer was not torch's; set the attention backend to native")
