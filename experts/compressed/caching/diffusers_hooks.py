"""diffusers' cache hooks for transformers, with a separate set of hooks for each trajectory.

A hook stores its features inside the network that it is attached to. So each trajectory gets a copy of the network
that shares all parameters. `first_block` decides from the statistics of a batch, so it gets one copy for each sample.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from ddm_core.artifacts import STRICT
from experts.types import RowIds

if TYPE_CHECKING:  # its import takes as long as that of torch, and few ensembles have a hook
    from diffusers.hooks import HookRegistry

HookKind = Literal["taylorseer", "first_block", "mag", "pyramid", "faster"]

LAYERS = [r"transformer_blocks\.\d+\.attn1?", r"transformer_blocks\.\d+\.ff"]
"""The layers that TaylorSeer caches; its default patterns match no layer of a DiT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheHook:
    """One of diffusers' hooks and its settings."""

    kind: HookKind
    interval: int = 3
    """`taylorseer`, `pyramid` and `faster` compute a layer on one step in this many; `mag` skips at most this many less
    one in a row."""
    order: int = 1
    """`taylorseer`: order of the extrapolation."""
    threshold: float = 0.1
    """`first_block` and `mag`: the change above which a step is computed."""
    ratios: tuple[float, ...] = ()
    """`mag`: magnitude of the blocks' residual relative to the step before, for each step."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT


class FirstTimestepRecorder:
    """Records the timestep that a network is called with, which `pyramid` reads, and counts the calls."""

    def __init__(self) -> None:
        self.timestep, self.calls = 0.0, 0

    @classmethod
    def attach(cls, model: nn.Module) -> "FirstTimestepRecorder":
        """Return a recorder that sees every call of the model."""
        recorder = cls()
        model.register_forward_pre_hook(recorder, with_kwargs=True)
        return recorder

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the timestep of the first row, the network's second argument."""
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        self.timestep, self.calls = float(t[0]), self.calls + 1


def apply_cache_hook(model: nn.Module, hook: CacheHook, *, calibrate: int = 0) -> nn.Module:
    """Return a copy that shares all parameters and has fresh hooks; raise `ValueError` if no layer matches the hook.

    `calibrate` is the number of calls that `mag` observes before it prints its ratios; 0 observes nothing.
    """
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    hooked = copy.deepcopy(model, shared)
    _APPLY[hook.kind](hooked, hook, calibrate)
    if not any(registry.hooks for registry in _registries(hooked)):
        raise ValueError(
            f"diffusers' hook {hook.kind} must match a layer; a {type(model).__name__} has none; choose another hook"
        )
    _set_cache_context(hooked, CacheContext(name="ddm"))
    return hooked


def _registries(model: nn.Module) -> "list[HookRegistry]":
    from diffusers.hooks import HookRegistry

    candidates = [getattr(module, "_diffusers_hook", None) for module in model.modules()]
    return [registry for registry in candidates if isinstance(registry, HookRegistry)]


def _taylorseer(model: nn.Module, hook: CacheHook, _calibrate: int) -> None:
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    config = TaylorSeerCacheConfig(
        cache_interval=hook.interval,
        disable_cache_before_step=hook.order + 1,
        max_order=hook.order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=LAYERS,
    )
    apply_taylorseer_cache(model, config)


def _first_block(model: nn.Module, hook: CacheHook, _calibrate: int) -> None:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    blocks = getattr(model, "transformer_blocks", None)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) < 2:
        raise ValueError(
            f"diffusers' hook first_block needs two transformer blocks; a {type(model).__name__} has fewer"
        )
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=hook.threshold))


def _mag(model: nn.Module, hook: CacheHook, calibrate: int) -> None:
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    settings: dict[str, Any] = {"mag_ratios": list(hook.ratios)} if not calibrate else {"calibrate": True}
    config = MagCacheConfig(
        threshold=hook.threshold,
        max_skip_steps=hook.interval - 1,
        num_inference_steps=calibrate or len(hook.ratios),
        **settings,
    )
    apply_mag_cache(model, config)


def _pyramid(model: nn.Module, hook: CacheHook, _calibrate: int) -> None:
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    recorder = FirstTimestepRecorder.attach(model)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=hook.interval,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: recorder.timestep,
    )
    apply_pyramid_attention_broadcast(model, config)


def _faster(model: nn.Module, hook: CacheHook, _calibrate: int) -> None:
    """Extrapolate attention from its latest two outputs; the branches of guidance are rows, and both are computed."""
    from diffusers.hooks import FasterCacheConfig, apply_faster_cache

    recorder = FirstTimestepRecorder.attach(model)
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=hook.interval,
        spatial_attention_timestep_skip_range=(-1, 1),
        current_timestep_callback=lambda: 0 if recorder.calls > EXTRAPOLATED else 1,
        attention_weight_callback=lambda _module: 0.5,
        tensor_format="BCHW",
        is_guidance_distilled=True,
    )
    apply_faster_cache(model, config)
    if len(_registries(model)) < 2:  # the one of the network alone caches nothing
        raise ValueError(f"diffusers' hook faster must match a layer of attention; a {type(model).__name__} has none")


EXTRAPOLATED = 2
"""Outputs that `faster` extrapolates from: so many first steps are computed."""

_APPLY: dict[HookKind, Callable[[nn.Module, CacheHook, int], None]] = {
    "taylorseer": _taylorseer,
    "first_block": _first_block,
    "mag": _mag,
    "pyramid": _pyramid,
    "faster": _faster,
}


@dataclass(slots=True, kw_only=True)
class HookedModel:
    """A network copy and the samples that use it."""

    rows: RowIds
    model: nn.Module
    index: int


@dataclass(slots=True, kw_only=True)
class HookedModels:
    """The network copies of one trajectory."""

    groups: list[HookedModel] = field(default_factory=list)

    def run(
        self,
        model: nn.Module,
        hook: CacheHook,
        index: int,
        rows: RowIds,
        evaluate: Callable[[RowIds, nn.Module], Tensor],
    ) -> Tensor:
        """Return the output for all rows; `evaluate` takes positions in `rows` and the network to call.

        Hooks count calls from the first one on and do not track single samples. So this raises `ValueError` if the
        rows differ from those of the first step, or for a second evaluation at the same t.
        """
        if not self.groups and index == 0:
            batches: Sequence[RowIds] = list(torch.split(rows, 1)) if hook.kind == "first_block" else [rows]
            self.groups = [HookedModel(rows=batch, model=apply_cache_hook(model, hook), index=-1) for batch in batches]
        cached_rows = torch.cat([group.rows for group in self.groups] or [rows[:0]])
        if not torch.equal(cached_rows, rows) or any(group.index != index - 1 for group in self.groups):
            raise ValueError(
                "diffusers' hooks need the same batch, called once a step; sample with selection sticky and solver "
                "euler, or choose accelerate.method=cache"
            )
        outputs, start = [], 0
        for group in self.groups:
            positions = torch.arange(start, start + len(group.rows), device=rows.device)
            outputs.append(evaluate(positions, group.model))
            group.index, start = index, start + len(group.rows)
        return torch.cat(outputs)
