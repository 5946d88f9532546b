"""Networks of an ensemble through `torch.compile`, once each; count their FLOPs before, since that looks inside."""

from collections.abc import Iterable

from torch import nn

from ensemble.drafted import DraftedExpert
from ensemble.schedule import ScheduledExpert
from experts.expert import Expert
from experts.int8_linear import Int8Linear


def compile_networks(experts: Iterable[object]) -> None:
    """In place; what is no network of our own, has a cache, or is compiled already, stays."""
    for expert in experts:
        if isinstance(expert, ScheduledExpert):
            compile_networks(expert.networks)
        elif isinstance(expert, DraftedExpert):
            compile_networks([expert.draft, expert.refiner])
        elif isinstance(expert, Expert) and expert.cache is None:
            _compile(expert.model)


def _compile(model: nn.Module) -> None:
    if model._compiled_call_impl is not None:
        return
    for layer in model.modules():
        if isinstance(layer, Int8Linear):
            layer.prepare()
    model.compile(dynamic=True)
