"""Modules that take the place of a diffusers model's own layers or weights, and stand in its folder's `forms.json`.

A form keeps what it holds in buffers, so the model's state dict, and the file that diffusers writes, are as small as
it is. To add one, write a module with `FORM` and `settings()`, say how an empty one is put in place, and add it to
`FORMS`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import nn

from experts.compressed.quantization.activation_quant import TimedInput, place_timed_input
from experts.compressed.quantization.int8_linear import Int8Linear, place_int8_linear
from experts.compressed.quantization.packed_weight import PackedWeight, place_packed_weight
from experts.compressed.quantization.shared_weight import SharedWeight, place_shared_weight
from experts.compressed.quantization.svd_linear import SVDLinear, place_svd_linear


@runtime_checkable
class Form(Protocol):
    """What every form has; it is a `torch.nn.Module` too."""

    FORM: str
    """Its name in `forms.json`."""

    def settings(self) -> dict[str, Any]:
        """What an empty form of the same shapes is made from, as JSON."""


FORMS: dict[str, Callable[[nn.Module, str, Mapping[str, Any]], None]] = {
    PackedWeight.FORM: place_packed_weight,
    SharedWeight.FORM: place_shared_weight,
    Int8Linear.FORM: place_int8_linear,
    SVDLinear.FORM: place_svd_linear,
    TimedInput.FORM: place_timed_input,
}
"""By name: put an empty form of these settings at a path of a model, in the place of what is there."""


def forms_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Every form in a model by its path."""
    return {
        path: {"form": module.FORM} | module.settings() for path, module in model.named_modules() if _is_form(module)
    }


def apply_forms(model: nn.Module, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Put empty forms into a model, whose state dict can then be loaded; raises `KeyError` or `ValueError`."""
    for path, described in found.items():
        settings = {key: value for key, value in described.items() if key != "form"}
        FORMS[described["form"]](model, path, settings)


def _is_form(module: nn.Module) -> bool:
    return isinstance(module, Form)
