"""Task routing: each t activates a window of the channels of every block, and the other channels pass it by.

    first(t) = round((C - floor(share C)) t^power)      the window is first(t) ... first(t) + floor(share C) - 1
    x <- block(m(t) x) + (1 - m(t)) x                   m(t) is 1 in the window and 0 outside

Denoising Task Routing (Park et al. 2024, arXiv:2310.07138), with share .8 and power 4. Each t is a task; close t share
most of their channels, and the higher the power the more of them at small t. It adds no parameters.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from experts.types import RowTimes

NAME = "task_routing"
"""Name of the routing in its network."""


class TaskRouting(nn.Module):
    """The windows of one network; holds the t of its rows while the network is called."""

    KIND: ClassVar[str] = NAME

    def __init__(self, share: float, power: float, blocks: Sequence[str] = (), output: int = -1) -> None:
        """Take the paths of the routed blocks, and which entry of a tuple that a block returns has their channels."""
        super().__init__()
        self.share, self.power, self.blocks, self.output = share, power, tuple(blocks), output
        self.t: RowTimes | None = None
        self.passing: Tensor | None = None
        """The channels that pass by the block that is being called; zero inside the window."""

    def settings(self) -> dict[str, Any]:
        """Return the arguments of its constructor."""
        return {"share": self.share, "power": self.power, "blocks": list(self.blocks), "output": self.output}

    def window(self, hidden: Shaped[Tensor, "batch *token channel"]) -> Bool[Tensor, "batch *one channel"]:
        """Return which channels are active, one row of channels a sample; raise `RuntimeError` if t does not fit."""
        if self.t is None or len(self.t) != len(hidden):
            raise RuntimeError(
                f"a network with task routing needs the t of its {len(hidden)} rows; call it by call_network"
            )
        channels = hidden.shape[-1]
        width = max(1, math.floor(self.share * channels))
        first = torch.round((channels - width) * self.t.to(hidden.device, torch.float32) ** self.power)[:, None]
        index = torch.arange(channels, device=hidden.device)
        active = (index >= first) & (index < first + width)
        return active.reshape(len(hidden), *[1] * (hidden.ndim - 2), channels)


def add_task_routing(model: nn.Module, path: str, settings: Mapping[str, Any]) -> None:
    """Route the blocks of a network by t, in place; `settings` are the arguments of `TaskRouting`.

    Raises `ValueError` for another path than `task_routing`, for a network that has it, and without blocks.
    """
    if path != NAME or NAME in model._modules or not settings["blocks"]:
        raise ValueError(f"task routing needs blocks and its own place in the network, not {path} with {settings}")
    attach_routing(model, TaskRouting(**settings))


def attach_routing(model: nn.Module, routing: TaskRouting) -> None:
    """Make a routing part of a network, in place; raise `AttributeError` for a block that is not there."""
    for path in routing.blocks:
        block = model.get_submodule(path)
        block.register_forward_pre_hook(partial(_select_channels, routing), with_kwargs=True)
        block.register_forward_hook(partial(_add_passing, routing))
    model.add_module(NAME, routing)


def set_task_times(model: nn.Module, t: RowTimes) -> None:
    """Set the t of the rows of the next call, if the network has task routing."""
    if isinstance(routing := model._modules.get(NAME), TaskRouting):
        routing.t = t


def _select_channels(
    routing: TaskRouting, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Zero the channels outside the window of a block's hidden states, its first argument or `hidden_states`."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    active = routing.window(hidden)
    routing.passing = hidden.masked_fill(active, 0)
    hidden = hidden.masked_fill(~active, 0)
    return ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})


def _add_passing(routing: TaskRouting, _block: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
    """Add the channels that passed by to what the block returns."""
    passing, routing.passing = routing.passing, None
    if not isinstance(output, tuple):
        return output + passing
    parts = list(output)
    parts[routing.output] = parts[routing.output] + passing
    return tuple(parts)
