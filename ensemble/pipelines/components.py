"""Components of a diffusers pipeline: networks that refer to the object that calls them, and names for K experts.

diffusers moves, quantizes, compiles and offloads components that are networks. An expert, a router and a text encoder
are more than their network, and so the network carries a reference to them.
"""

import inspect
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import nn

from ensemble.pipeline_folder import PipelineError
from experts.conditions.null_text import get_null_text, set_null_text
from experts.conditions.text_embedding import TextEmbedding
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.expert_model import ExpertModel
from experts.networks.adapters.registry import ADAPTERS

PREFIX = "expert_"
OWNER = "ddm_owner"


def expert_name(expert_id: int) -> str:
    """Return the name of an expert's component."""
    return f"{PREFIX}{expert_id}"


def expert_ids(names: Iterable[str]) -> list[int]:
    """Return the ids of the experts among names of components, in order."""
    numbers = (name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))
    return sorted(int(number) for number in numbers if number.isdigit())


@cache
def with_experts(pipeline_class: Any, names: tuple[str, ...]) -> Any:
    """Return a subclass with these experts as optional components, which diffusers reads from its signature."""
    own = [p for p in inspect.signature(pipeline_class.__init__).parameters.values() if p.kind is not p.VAR_KEYWORD]
    experts = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]

    def init(self: Any, *args: Any, **components: Any) -> None:
        pipeline_class.__init__(self, *args, **components)

    vars(init)["__signature__"] = inspect.Signature([*own, *experts])
    members = {
        "__init__": init,
        "__doc__": pipeline_class.__doc__,
        "__module__": pipeline_class.__module__,
        "_optional_components": [*pipeline_class._optional_components, *names],
        "_exclude_from_cpu_offload": list(names),
    }
    return type(pipeline_class.__name__, (pipeline_class,), members)


class ExpertNetworks(nn.ModuleList):
    """All networks of one expert, with the properties that diffusers reads of a component."""

    @property
    def device(self) -> torch.device:
        """Return the device of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the first parameter."""
        return next(self.parameters()).dtype


def to_component(owner: Any) -> Any:
    """Return the network of an expert, a router or a text encoder, with a reference to it; all others unchanged.

    Several networks of one expert become one `ExpertNetworks`.
    """
    component: Any
    if isinstance(owner, ExpertModel):
        networks = list(owner.networks())
        component = networks[0] if len(networks) == 1 else ExpertNetworks(networks)
    else:
        component = getattr(owner, "model", None)
    if isinstance(owner, nn.Module) or not isinstance(component, nn.Module):
        return owner
    vars(component)[OWNER] = owner
    return component


def owner_of(component: Any) -> Any:
    """Return the object whose network a component is; the component itself if it has none."""
    return getattr(component, "__dict__", {}).get(OWNER, component)


def as_expert(
    network: nn.Module, expert_id: int, latent_shape: tuple[int, ...], null_text: TextEmbedding | None
) -> Expert:
    """Return an expert with a plain network, which predicts the velocity of rectified flow.

    `null_text` is its null text unless it has one of its own. Raises `PipelineError` for a network without adapter, or
    without the null text that it needs.
    """
    if type(network).__name__ not in ADAPTERS:
        raise PipelineError(f"{type(network).__name__} has no adapter; known networks are {', '.join(ADAPTERS)}")
    if get_null_text(network) is None and ADAPTERS[type(network).__name__].reads_text:
        if null_text is None:
            raise PipelineError(f"{type(network).__name__} reads text; give a text_encoder, or its null_text")
        set_null_text(network, null_text)
    return Expert(
        model=network.eval(),
        prediction="velocity",
        noise_schedule=RECTIFIED_FLOW,
        latent_shape=latent_shape,
        num_classes=_count_classes(network),
        cluster_id=expert_id,
    )


def _count_classes(network: Any) -> int:
    """Return the classes of a network without its null class; 0 for one that reads none."""
    if not ADAPTERS[type(network).__name__].reads_classes:
        return 0
    config, null_rows = network.config, {"num_classes": 0, "num_embeds_ada_norm": 0, "num_class_embeds": 1}
    return next((config[key] - rows for key, rows in null_rows.items() if config.get(key) is not None), 0)
