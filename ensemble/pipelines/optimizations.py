"""What diffusers has to make networks cheaper, for the experts of a pipeline: caches, compiled blocks, quantization.

Nothing of it is saved; `ddm compress` makes ensembles that are smaller or faster on disk.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ensemble.ensemble import Ensemble
from ensemble.pipeline_folder import PipelineError
from experts.compressed.caching.diffusers_hooks import CacheHook, apply_cache_hook
from experts.compressed.caching.plan import CacheSchedule
from experts.conditions.condition import Condition
from experts.conditions.null_text import get_null_text, set_null_text
from experts.expert import METADATA_FILE, Expert
from experts.expert_model import ExpertModel
from experts.networks.model_io import QUANTIZATION_CONFIG, STRUCTURE

CACHES: Mapping[str, Callable[[Any], CacheHook]] = {
    "TaylorSeerCacheConfig": lambda config: CacheHook(
        kind="taylorseer", interval=config.cache_interval, order=config.max_order
    ),
    "FirstBlockCacheConfig": lambda config: CacheHook(kind="first_block", threshold=config.threshold),
    "FasterCacheConfig": lambda config: CacheHook(kind="faster", interval=config.spatial_attention_block_skip_range),
    "PyramidAttentionBroadcastConfig": lambda config: CacheHook(
        kind="pyramid", interval=config.spatial_attention_block_skip_range
    ),
}
"""Configurations of diffusers' caches; of each, these settings are used."""
COMPRESSED_FILES = (STRUCTURE, QUANTIZATION_CONFIG)
TRIED_TIMES = (1.0, 0.75, 0.5, 0.25)


class OptimizationMethods:
    """Methods of a pipeline that make its experts cheaper, until it is loaded again."""

    def enable_cache(self, config: Any, *, experts: Sequence[int] | None = None) -> None:
        """Cache features of these experts (default: all) with one of diffusers' configurations of a cache.

        Each trajectory has its own cache. It needs a scheduler with one evaluation a step, and a selection that keeps
        the experts of an image. `FasterCacheConfig` extrapolates attention, in both branches of guidance. Counted calls
        are those without a cache. Raises `PipelineError` for a configuration or a class of networks that cannot.
        """
        name = type(config).__name__
        if name not in CACHES:
            raise PipelineError(f"a cache must be one of {', '.join(CACHES)}; got {name}")
        hook = CACHES[name](config)
        chosen = self._choose(experts)
        for k, expert in chosen.items():
            try:
                _try_cache(expert, hook)
            except (ValueError, TypeError, RuntimeError, AttributeError) as error:
                reason = f"{type(expert.model).__name__}, cannot use {name}: {error}"
                raise PipelineError(f"expert {k}, a {reason}; choose another cache, or leave the expert out") from error
        pipeline: Any = self
        pipeline.cache_hooks |= dict.fromkeys(chosen, hook)

    def disable_cache(self) -> None:
        """Compute all features again."""
        pipeline: Any = self
        pipeline.cache_hooks.clear()

    def compile_repeated_blocks(self, *, experts: Sequence[int] | None = None, **settings: Any) -> None:
        """Compile the repeated blocks of these experts (default: all) when they are called next.

        `settings` are those of `torch.compile`. Raises `PipelineError` for a network without a list of blocks.
        """
        chosen = {k: (expert, _repeated_blocks(expert.model)) for k, expert in self._choose(experts).items()}
        for k, (expert, blocks) in chosen.items():
            if not blocks:
                raise PipelineError(f"expert {k}, a {type(expert.model).__name__}, has no list of blocks to compile")
        for _, blocks in chosen.values():
            for block in blocks:
                block.compile(**settings)

    def _choose(self, experts: Sequence[int] | None) -> dict[int, Expert]:
        """Return these experts; raise `PipelineError` for those that are not there, or are no single loaded network."""
        pipeline: Any = self
        present: dict[int, ExpertModel] = pipeline.experts
        chosen = {k: present.get(k) for k in (present if experts is None else experts)}
        for k, expert in chosen.items():
            if expert is None:
                raise PipelineError(f"there is no expert {k}; the experts are {', '.join(map(str, present))}")
            if not isinstance(expert, Expert):
                raise PipelineError(
                    f"expert {k} is loaded by need or has several networks; load all (no max_memory), or leave it out"
                )
            if expert.cache is not None:
                raise PipelineError(f"expert {k} was compressed with a cache of its own; load the original ensemble")
        return {k: expert for k, expert in chosen.items() if isinstance(expert, Expert)}


def _repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the blocks that diffusers lists for a class; of other classes, those in the network's own lists."""
    if names := getattr(network, "_repeated_blocks", None):
        return [module for module in network.modules() if type(module).__name__ in names]
    return [block for blocks in network.children() if isinstance(blocks, nn.ModuleList) for block in blocks]


@torch.no_grad()
def _try_cache(expert: Expert, hook: CacheHook) -> None:
    """Evaluate some steps of one row with a cache; raise what diffusers raises if it does not support the network."""
    hooked = replace(expert, model=apply_cache_hook(expert.model, hook))
    parameter = next(expert.model.parameters())
    row = torch.zeros(1, *expert.latent_shape, device=parameter.device, dtype=parameter.dtype)
    for t in TRIED_TIMES:
        hooked.velocity(row, row.new_full((1,), t, dtype=torch.float32), Condition.null(1).to(row.device))


def with_caches(ensemble: Ensemble, hooks: Mapping[int, CacheHook], times: Sequence[float]) -> Ensemble:
    """Return the ensemble with caches for trajectories of these t; raise `PipelineError` if two of them are equal."""
    if not hooks:
        return ensemble
    try:
        schedules = {
            k: CacheSchedule(times=tuple(times), compute_steps={}, relative_flops=(1.0,) * len(times), hook=hook)
            for k, hook in hooks.items()
        }
    except ValueError as error:
        raise PipelineError(
            f"caches count calls as steps, and this scheduler has several calls a step ({error}); use "
            "FlowMatchEulerDiscreteScheduler, or disable_cache"
        ) from error
    cached = {
        k: replace(expert, cache=schedules[k]) if k in schedules and isinstance(expert, Expert) else expert
        for k, expert in ensemble.experts.items()
    }
    return replace(ensemble, experts=cached)


def quantizing_loader(config: Any, names: Sequence[str]) -> Callable[[Path], ExpertModel | None]:
    """Return a function that loads and quantizes the folder of an expert that a `PipelineQuantizationConfig` names.

    `names` are the experts that are there. Raises `PipelineError` if the configuration names another component.
    """
    named = set(config.quant_mapping or config.components_to_quantize or names)
    if others := sorted(named - set(names)):
        raise PipelineError(f"{others[0]!r} is no expert; those that can be quantized are {', '.join(names)}")

    def load(folder: Path) -> ExpertModel | None:
        if folder.name not in named:
            return None
        if not (folder / METADATA_FILE).is_file() or any((folder / name).exists() for name in COMPRESSED_FILES):
            raise PipelineError(f"{folder} is compressed, and is not quantized again; leave {folder.name} out")
        expert = Expert.load(folder)
        return replace(expert, model=_quantize(expert.model, folder, config))

    return load


def _quantize(network: nn.Module, folder: Path, config: Any) -> nn.Module:
    """Load a folder again, quantized by diffusers; `network` is the plain one."""
    network_class: Any = type(network)
    name = network_class.__name__
    try:
        settings = config._resolve_quant_config(is_diffusers=True, module_name=folder.name)
        quantized: nn.Module = network_class.from_pretrained(
            folder, quantization_config=settings, use_safetensors=True, dtype=next(network.parameters()).dtype
        )
    except (ImportError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PipelineError(f"{folder.name}, a {name}, was not quantized: {reason}") from error
    plain = {key: type(value) for key, value in network.named_parameters()}
    kept = {key: type(value) for key, value in quantized.named_parameters()}
    if kept == plain and [type(part) for part in quantized.modules()] == [type(part) for part in network.modules()]:
        raise PipelineError(f"{folder.name} has no layer that this configuration quantizes; choose another")
    return set_null_text(quantized, get_null_text(network)).eval()


def is_quantized(network: Any) -> bool:
    """Return whether diffusers quantized a network when it was loaded."""
    return getattr(network, "hf_quantizer", None) is not None
