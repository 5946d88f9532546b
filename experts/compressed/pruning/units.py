"""Unit pruning: attention heads, hidden neurons and groups of hidden channels are physically removed from layers.

A *unit* is removed as a whole:

* an attention head, of diffusers' `Attention`;
* a hidden neuron, of diffusers' `FeedForward` and of our `ResidualBlock`;
* a group of channels between the two convolutions of diffusers' `ResnetBlock2D`, as wide as a group of its second
  normalization, so that the statistics of the other groups do not change.

The pruned layer computes exactly what the original layer computes with the outputs of the removed units set to zero. A
layer keeps at least one unit; `layers.py` removes whole layers.
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
from experts.compressed.attention.regional import NAME as REGIONAL
from experts.compressed.attention.regional import RegionalSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitGroup:
    """The units of one layer and the modules that hold them."""

    count: int
    size: int
    """Adjacent features, or channels, of a unit."""
    reader: str
    """Path, within the layer, of the module that reads the units' outputs; masks multiply its input."""
    writers: Mapping[str, int]
    """Paths, within the layer, of the modules that write the outputs, and how many copies of all units each holds."""
    norm: str | None = None
    """Path of a group normalization between them that has one group a unit."""


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


_UNIT_GROUPS: dict[type[nn.Module], Callable[[Any], UnitGroup]] = {
    Attention: _attention,
    FeedForward: _feed_forward,
    ResnetBlock2D: _resnet,
    ResidualBlock: _residual_block,
}


def unit_groups(model: nn.Module) -> dict[str, UnitGroup]:
    """Return the units of every layer that has some, by its path; not of layers whose heads share keys or norms."""
    groups = {}
    for path, module in model.named_modules():
        create_group = _UNIT_GROUPS.get(type(module))
        if create_group and not _has_shared_heads(module):
            groups[path] = create_group(module)
    return groups


def prunable_units(model: nn.Module) -> dict[str, int]:
    """Return the number of units of every layer that can be pruned, by its path; quantized layers cannot be."""
    return {
        path: units.count for path, units in unit_groups(model).items() if _is_plain(model.get_submodule(path), units)
    }


def unit_counts(model: nn.Module) -> dict[str, int]:
    """Return the number of units, by path, of the layers that have fewer than `config.json` would build."""
    groups = unit_groups(model)
    if not groups:
        return {}
    configured: Any = model
    settings = {key: value for key, value in configured.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        original = unit_groups(type(model)(**settings))
    return {
        path: units.count for path, units in groups.items() if path in original and units.count < original[path].count
    }


def shrink_to(model: nn.Module, widths: Mapping[str, int]) -> None:
    """Prune layers of a new model to these unit counts, in place; raise `ValueError` if one has fewer units."""
    prune_units(model, {path: range(width) for path, width in widths.items()})


def prune_units(model: nn.Module, remaining: Mapping[str, Sequence[int]]) -> None:
    """Remove all units but the remaining indices from the layers at these paths, in place; their order is kept.

    Raises `ValueError` for a path without units, and for indices that are empty, out of range or repeated.
    """
    groups = unit_groups(model)
    for path, indices in remaining.items():
        if path not in groups:
            raise ValueError(f"{path} has no units to prune; prune {', '.join(groups) or 'another model'}")
        module, units = model.get_submodule(path), groups[path]
        if not _is_plain(module, units):
            raise ValueError(f"{path} is quantized; prune a network before it is quantized")
        order = sorted(set(indices))
        if not order or len(order) < len(indices) or order[0] < 0 or order[-1] >= units.count:
            raise ValueError(
                f"{path} has {units.count} units and cannot keep {len(indices)} of indices {order[:3]}...; "
                f"give different ones from 0 to {units.count - 1}, at least one"
            )
        if len(order) < units.count:
            _prune_group(module, units, order)


def parameters_per_unit(model: nn.Module) -> dict[str, int]:
    """Return the number of parameters that each unit of a layer has, by the layer's path."""
    counts = {}
    for path, units in unit_groups(model).items():
        if _is_plain(module := model.get_submodule(path), units):
            counts[path] = _parameters(module, units) // units.count
    return counts


def _parameters(module: nn.Module, units: UnitGroup) -> int:
    paths = [*units.writers, units.norm] if units.norm else list(units.writers)
    written = sum(parameter.numel() for path in paths for parameter in module.get_submodule(path).parameters())
    return written + module.get_submodule(units.reader).get_parameter("weight").numel()


def _has_shared_heads(module: nn.Module) -> bool:
    """Return whether it is attention whose heads share a projection or a norm."""
    if not isinstance(module, Attention):
        return False
    is_separate = module.norm_q is None and module.norm_k is None and module.added_kv_proj_dim is None
    return not is_separate or module.inner_kv_dim != module.inner_dim or module.fused_projections


def _is_plain(module: nn.Module, units: UnitGroup) -> bool:
    layers = [module.get_submodule(path) for path in (units.reader, *units.writers)]
    return all(type(layer) in (nn.Linear, nn.Conv2d) for layer in layers)


def _prune_group(module: nn.Module, units: UnitGroup, remaining: list[int]) -> None:
    """Select rows of the writers and columns of the reader, and set the modules' width attributes."""
    entries = torch.tensor([unit * units.size + offset for unit in remaining for offset in range(units.size)])
    width = units.count * units.size
    for path, copies in units.writers.items():
        rows = torch.cat([entries + number * width for number in range(copies)])
        _select_rows(module.get_submodule(path), rows)
    reader: Any = module.get_submodule(units.reader)
    reader.weight = _select(reader.weight, entries, 1)
    setattr(reader, "in_channels" if isinstance(reader, nn.Conv2d) else "in_features", len(entries))
    if units.norm:
        norm: Any = module.get_submodule(units.norm)
        norm.weight, norm.bias = _select(norm.weight, entries, 0), _select(norm.bias, entries, 0)
        norm.num_groups, norm.num_channels = len(remaining), len(entries)
    if isinstance(module, Attention):
        module.heads, module.sliceable_head_dim = len(remaining), len(remaining)
        module.inner_dim, module.inner_kv_dim = len(entries), len(entries)
        if isinstance(summary := getattr(module, REGIONAL, None), RegionalSummary):
            summary.keep_heads(remaining)


def _select_rows(layer: Any, rows: Tensor) -> None:
    layer.weight = _select(layer.weight, rows, 0)
    if layer.bias is not None:
        layer.bias = _select(layer.bias, rows, 0)
    setattr(layer, "out_channels" if isinstance(layer, nn.Conv2d) else "out_features", len(rows))


def _select(parameter: nn.Parameter, entries: Tensor, dim: int) -> nn.Parameter:
    """Return a copy of some entries of a parameter along `dim`."""
    selected = parameter.detach().index_select(dim, entries.to(parameter.device))
    return nn.Parameter(selected, requires_grad=parameter.requires_grad)
