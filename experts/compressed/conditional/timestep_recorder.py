"""The timesteps of a network's latest call, for layers within that depend on them."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn


class TimestepRecorder:
    """Records the timesteps of a network's latest call, in the network's unit."""

    def __init__(self) -> None:
        self.timestep: Float[Tensor, " batch"] | None = None

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the timesteps, the network's second argument or one of the names that classes give it."""
        t = args[1] if len(args) > 1 else kwargs["timestep"] if "timestep" in kwargs else kwargs["t"]
        self.timestep = t.detach()


def find_recorder(model: nn.Module) -> TimestepRecorder:
    """Return the network's recorder; add one if it has none."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, TimestepRecorder):
            return hook
    recorder = TimestepRecorder()
    model.register_forward_pre_hook(recorder, with_kwargs=True)
    return recorder
