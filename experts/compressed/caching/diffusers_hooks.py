"""diffusers' own cache hooks, for transformers: one set of hooks for the samples of each trajectory.

A hook keeps its features inside the network that it hangs in. So each trajectory gets a network of its own that shares
all parameters, and `first_block`, which decides by what it sees of a whole batch, gets one for each sample.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    HookRegistry,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from jaxtyping import Int
from torch import Tensor, nn

Rows = Int[Tensor, " row"]
HookKind = Literal["taylorseer", "first_block", "mag", "pyramid"]

LAYERS = [r"transformer_blocks\.\d+\.attn1", r"transformer_blocks\.\d+\.ff"]
"""What TaylorSeer keeps; its own patterns match no layer of a DiT."""
CONTEXT = CacheContext(name="ddm")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheHook:
    """One of diffusers' hooks and its settings."""

    kind: HookKind
    interval: int = 3
    """`taylorseer` and `pyramid`: a layer is computed at one of so many steps; `mag`: at most so many less one are
    skipped in a row."""
    order: int = 1
    """`taylorseer`: how many differences it goes on by."""
    threshold: float = 0.1
    """`first_block` and `mag`: how much may change before a step is computed."""
    ratios: tuple[float, ...] = ()
    """`mag`: how the size of what the blocks add changes from step to step."""

    @classmethod
    def parsed(cls, found: Mapping[str, Any]) -> "CacheHook":
        """From JSON; raises `KeyError`, `TypeError` or `ValueError`."""
        if found["kind"] not in get_args(HookKind):
            raise ValueError(f"hook {found['kind']!r}")
        return cls(**{**found, "ratios": tuple(float(ratio) for ratio in found["ratios"])})

    def described(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


class TimestepRecorder:
    """Says the timestep that a network is called with, which one hook wants to know."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the timestep of the first row; it comes second."""
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        self.now = float(t[0])


def apply_cache_hook(model: nn.Module, hook: CacheHook, *, calibrate: int = 0) -> nn.Module:
    """A network with the same parameters and fresh hooks; `ValueError` if they found nothing to hang in.

    `calibrate` is how many calls `mag` observes before it prints its ratios; 0 observes nothing.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    made = copy.deepcopy(model, shared)
    _APPLY[hook.kind](made, hook, calibrate)
    if not any(registry.hooks for registry in _registries(made)):
        raise ValueError(
            f"diffusers' hook {hook.kind} matches nothing in a {type(model).__name__}, and would do nothing"
        )
    _set_cache_context(made, CONTEXT)
    return made


def _registries(model: nn.Module) -> list[HookRegistry]:
    found = [getattr(module, "_diffusers_hook", None) for module in model.modules()]
    return [registry for registry in found if isinstance(registry, HookRegistry)]


def _taylorseer(model: nn.Module, hook: CacheHook, _calibrate: int) -> None:
    config = TaylorSeerCacheConfig(
        cache_interval=hook.interval,
        disable_cache_before_step=hook.order + 1,
        max_order=hook.order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=LAYERS,
    )
    apply_taylorseer_cache(model, config)


def _first_block(model: nn.Module, hook: CacheHook, _calibrate: int) -> None:
    blocks = getattr(model, "transformer_blocks", None)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) < 2:
        raise ValueError(f"diffusers' hook first_block needs two transformer blocks; a {type(model).__name__} has none")
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=hook.threshold))


def _mag(model: nn.Module, hook: CacheHook, calibrate: int) -> None:
    settings: dict[str, Any] = {"mag_ratios": list(hook.ratios)} if not calibrate else {"calibrate": True}
    config = MagCacheConfig(
        threshold=hook.threshold,
        max_skip_steps=hook.interval - 1,
        num_inference_steps=calibrate or len(hook.ratios),
        **settings,
    )
    apply_mag_cache(model, config)


def _pyramid(model: nn.Module, hook: CacheHook, _calibrate: int) -> None:
    clock = TimestepRecorder()
    model.register_forward_pre_hook(clock, with_kwargs=True)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=hook.interval,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: clock.now,
    )
    apply_pyramid_attention_broadcast(model, config)


_APPLY: dict[HookKind, Callable[[nn.Module, CacheHook, int], None]] = {
    "taylorseer": _taylorseer,
    "first_block": _first_block,
    "mag": _mag,
    "pyramid": _pyramid,
}


@dataclass(slots=True, kw_only=True)
class HookedModel:
    """Samples with a network of their own."""

    rows: Rows
    model: nn.Module
    index: int


@dataclass(slots=True, kw_only=True)
class HookedModels:
    """The networks of one trajectory."""

    groups: list[HookedModel] = field(default_factory=list)

    def run(
        self, model: nn.Module, hook: CacheHook, index: int, rows: Rows, said: Callable[[Rows, nn.Module], Tensor]
    ) -> Tensor:
        """What `said` says of all rows, given places in `rows` and the network to ask.

        Raises `ValueError` if samples have come or gone since the first evaluation, or for a second one at the same t:
        hooks count calls from the first one on, and know nothing of single samples.
        """
        if not self.groups and index == 0:
            apart: Sequence[Rows] = list(torch.split(rows, 1)) if hook.kind == "first_block" else [rows]
            self.groups = [HookedModel(rows=one, model=apply_cache_hook(model, hook), index=-1) for one in apart]
        known = torch.cat([group.rows for group in self.groups] or [rows[:0]])
        if not torch.equal(known, rows) or any(group.index != index - 1 for group in self.groups):
            raise ValueError(
                "diffusers' hooks keep features of a whole batch that is called once a step; sample with selection "
                "sticky and solver euler, or take accelerate.method=cache"
            )
        parts, start = [], 0
        for group in self.groups:
            places = torch.arange(start, start + len(group.rows), device=rows.device)
            parts.append(said(places, group.model))
            group.index, start = index, start + len(group.rows)
        return torch.cat(parts)
