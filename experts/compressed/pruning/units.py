"""Narrow layers: attention heads, hidden neurons and groups of hidden channels are really taken out of a network.

A *unit* is what goes or stays as a whole:

* an attention head, of diffusers' `Attention`;
* a hidden neuron, of diffusers' `FeedForward` and of our `ResidualBlock`;
* a group of channels between the two convolutions of diffusers' `ResnetBlock2D`, as wide as a group of its second
  normalisation, whose statistics are those of whole groups and so stay what they are.

What is left computes exactly what the whole layer does where the missing units' outputs are multiplied by zero. A layer
keeps one unit at least; a layer that is gone altogether is a matter of `removal.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from experts.architectures.residual_mlp import ResidualBlock


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitGroup:
    """Where the units of one layer are."""

    count: int
    size: int
    """Neighbouring features, or channels, of a unit."""
    reader: str
    """The path, within the layer, of what reads the units' outputs; a mask is multiplied onto its input."""
    writers: Mapping[str, int]
    """Paths, within the layer, of what writes them; and how many times all units stand in its rows, one after the
    other."""
    norm: str | None = None
    """The path of a group normalisation between them that has one group a unit."""


def _attention(module: Attention) -> UnitGroup:
    writers = {"to_q": 1, "to_k": 1, "to_v": 1}
    return UnitGroup(
        count=module.heads, size=module.to_q.out_features // module.heads, reader="to_out.0", writers=writers
    )


def _feed_forward(module: FeedForward) -> UnitGroup:
    first, second = module.net[0].proj, module.net[2]
    count = second.in_features
    return UnitGroup(count=count, size=1, reader="net.2", writers={"net.0.proj": first.out_features // count})


def _resnet(module: ResnetBlock2D) -> UnitGroup:
    count, channels = module.norm2.num_groups, module.norm2.num_channels
    writers = {"conv1": 1}
    if module.time_emb_proj is not None:
        writers["time_emb_proj"] = module.time_emb_proj.out_features // channels
    return UnitGroup(count=count, size=channels // count, reader="conv2", writers=writers, norm="norm2")


def _residual_block(module: ResidualBlock) -> UnitGroup:
    return UnitGroup(count=module.inner.out_features, size=1, reader="outer", writers={"inner": 1})


_KINDS: dict[type[nn.Module], Callable[[Any], UnitGroup]] = {
    Attention: _attention,
    FeedForward: _feed_forward,
    ResnetBlock2D: _resnet,
    ResidualBlock: _residual_block,
}


def unit_groups(model: nn.Module) -> dict[str, UnitGroup]:
    """The units of every layer that has some, by its path; layers whose heads share keys or norms have none."""
    found = {}
    for path, module in model.named_modules():
        kind = _KINDS.get(type(module))
        if kind and not _is_shared(module):
            found[path] = kind(module)
    return found


def prunable_units(model: nn.Module) -> dict[str, int]:
    """How many units every layer that can still be cut has, by its path; layers in another form cannot be."""
    return {
        path: units.count for path, units in unit_groups(model).items() if _is_plain(model.get_submodule(path), units)
    }


def unit_counts(model: nn.Module) -> dict[str, int]:
    """Units that are left, by path, of the layers that have fewer than `config.json` would build."""
    found = unit_groups(model)
    if not found:
        return {}
    configured: Any = model
    settings = {key: value for key, value in configured.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        whole = unit_groups(type(model)(**settings))
    return {path: units.count for path, units in found.items() if path in whole and units.count < whole[path].count}


def shrink_to(model: nn.Module, widths: Mapping[str, int]) -> None:
    """Make layers of a fresh model that narrow, in place; `ValueError` if one has fewer units, or none."""
    prune_units(model, {path: range(width) for path, width in widths.items()})


def prune_units(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
    """Take all units but these out of the layers at these paths, in place, in the order of their indices.

    Raises `ValueError` for a path without units, and for indices that are empty, out of range or given twice.
    """
    found = unit_groups(model)
    for path, indices in kept.items():
        if path not in found:
            raise ValueError(f"{path} has no units that could be taken out; those of {', '.join(found) or 'none'} can")
        module, units = model.get_submodule(path), found[path]
        if not _is_plain(module, units):
            raise ValueError(f"{path} holds its weights in another form; cut a network before it is quantized")
        order = sorted(set(indices))
        if not order or len(order) < len(indices) or order[0] < 0 or order[-1] >= units.count:
            raise ValueError(
                f"{path} has {units.count} units and cannot keep {len(indices)} of indices {order[:3]}...; "
                f"give different ones from 0 to {units.count - 1}, at least one"
            )
        if len(order) < units.count:
            _prune_group(module, units, order)


def parameters_per_unit(model: nn.Module) -> dict[str, int]:
    """Parameters that go with each unit of a layer, by its path."""
    counts = {}
    for path, units in unit_groups(model).items():
        if _is_plain(module := model.get_submodule(path), units):
            counts[path] = _parameters(module, units) // units.count
    return counts


def _parameters(module: nn.Module, units: UnitGroup) -> int:
    owned = [*units.writers, units.norm] if units.norm else list(units.writers)
    counted = sum(parameter.numel() for path in owned for parameter in module.get_submodule(path).parameters())
    return counted + module.get_submodule(units.reader).get_parameter("weight").numel()


def _is_shared(module: nn.Module) -> bool:
    """Attention whose heads do not have everything to themselves."""
    if not isinstance(module, Attention):
        return False
    own = module.norm_q is None and module.norm_k is None and module.added_kv_proj_dim is None
    return not own or module.inner_kv_dim != module.inner_dim or module.fused_projections


def _is_plain(module: nn.Module, units: UnitGroup) -> bool:
    layers = [module.get_submodule(path) for path in (units.reader, *units.writers)]
    return all(type(layer) in (nn.Linear, nn.Conv2d) for layer in layers)


def _prune_group(module: nn.Module, units: UnitGroup, kept: list[int]) -> None:
    """Rows of what writes the units, columns of what reads them, and the widths that modules say they have."""
    entries = torch.tensor([unit * units.size + offset for unit in kept for offset in range(units.size)])
    width = units.count * units.size
    for path, times in units.writers.items():
        rows = torch.cat([entries + number * width for number in range(times)])
        _keep_rows(module.get_submodule(path), rows)
    reader: Any = module.get_submodule(units.reader)
    reader.weight = _kept(reader.weight, entries, 1)
    setattr(reader, "in_channels" if isinstance(reader, nn.Conv2d) else "in_features", len(entries))
    if units.norm:
        norm: Any = module.get_submodule(units.norm)
        norm.weight, norm.bias = _kept(norm.weight, entries, 0), _kept(norm.bias, entries, 0)
        norm.num_groups, norm.num_channels = len(kept), len(entries)
    if isinstance(module, Attention):
        module.heads, module.sliceable_head_dim = len(kept), len(kept)
        module.inner_dim, module.inner_kv_dim = len(entries), len(entries)


def _keep_rows(layer: Any, rows: Tensor) -> None:
    layer.weight = _kept(layer.weight, rows, 0)
    if layer.bias is not None:
        layer.bias = _kept(layer.bias, rows, 0)
    setattr(layer, "out_channels" if isinstance(layer, nn.Conv2d) else "out_features", len(rows))


def _kept(parameter: nn.Parameter, entries: Tensor, dim: int) -> nn.Parameter:
    """The part of a parameter, in memory of its own."""
    part = parameter.detach().index_select(dim, entries.to(parameter.device))
    return nn.Parameter(part, requires_grad=parameter.requires_grad)
