"""One stage: its method on every expert, or on all at once, and the comparison with the whole ensemble.

To add a method, write it, give it a configuration in `config.py` and a row here.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from ddm_core.artifacts import Workspace, read_json, to_jsonable, write_json
from ensemble.compression.acceleration.diffusers_hooks import hook_all
from ensemble.compression.acceleration.feature_cache import cache_all
from ensemble.compression.acceleration.truncated_start import truncate
from ensemble.compression.config import (
    CompressionConfig,
    DistillConfig,
    DynamicInt8Config,
    MethodConfig,
    WeightOnlyConfig,
    compression_label,
)
from ensemble.compression.distillation.config import ConsistencyConfig, MMDConfig, SiDConfig
from ensemble.compression.distillation.consistency import train_consistency
from ensemble.compression.distillation.mmd import finetune_mmd
from ensemble.compression.distillation.shared_student import distill_shared_student, shared_warmup
from ensemble.compression.distillation.sid import distill_sid
from ensemble.compression.handover import hand_over_after_base, stitch
from ensemble.compression.measurement import REPORT_FILE, compare
from ensemble.compression.method import (
    Clusters,
    CompressionContext,
    EnsembleMethod,
    EnsembleResult,
    ExpertResult,
    Method,
    StageError,
)
from ensemble.compression.per_expert import RESULT_FILE, each_expert
from ensemble.compression.pruning.ecodiff import prune_ecodiff
from ensemble.compression.pruning.laptop import prune_laptop
from ensemble.compression.quantization.mixed_precision import quantize_mixed_precision
from ensemble.compression.quantization.quest import quantize_quest
from ensemble.compression.quantization.shared_base import quantize_shared_base
from ensemble.compression.quantization.svdquant import quantize_svdquant
from ensemble.compression.quantization.weight_only import pack_all, quantize_dynamic_int8, quantize_weights
from ensemble.pipeline import DDMPipeline
from experts.expert import Expert
from router.router import Router

PLAIN: dict[str, Callable[[Expert, Any], ExpertResult]] = {
    "weight_only": quantize_weights,
    "dynamic_int8": quantize_dynamic_int8,
}
"""By name: what is done to each expert by itself, without data."""
EXPERT_METHODS: dict[str, Method] = {
    "sid": distill_sid,
    "consistency": train_consistency,
    "mmd": finetune_mmd,
    "laptop": prune_laptop,
    "ecodiff": prune_ecodiff,
    "svdquant": quantize_svdquant,
    "quest": quantize_quest,
}
"""The same with the latents of its own cluster."""
ENSEMBLE_METHODS: dict[str, EnsembleMethod] = {
    "cache": cache_all,
    "hook": hook_all,
    "truncate": truncate,
    "base_first": hand_over_after_base,
    "shared_base": quantize_shared_base,
    "mixed_precision": quantize_mixed_precision,
    "stitch": stitch,
}
"""What is done to all of them at once."""


def run_stage(
    config: CompressionConfig, ensemble: Path, whole: Path, clusters: Sequence[Path], out: Path, workspace: Workspace
) -> float:
    """Write the smaller ensemble and `compression.json` to `out`, and return the FLOPs of making and comparing it.

    `clusters` are the experts' own shards, in the order of their ids. Raises what the methods raise.
    """
    is_one = len(clusters) > 1 and not (ensemble / "router").is_dir()
    data = Clusters(folders=clusters, codec=ensemble / "codec", labelled=config.labelled, is_one=is_one)
    given = CompressionContext(
        ensemble=ensemble, original=whole, data=data, sampling=config.sampling, workspace=workspace
    )
    if config.method.method in ENSEMBLE_METHODS or is_dense(config.method):
        modules, flops = _compress_ensemble(config.method, given, out)
    else:
        modules, flops = _compress_experts(config.method, given, out)
    stages = (*stage_records(ensemble), compression_label(config.method))
    found = compare(stages, modules, whole, out, config.sampling, config.num_samples, workspace)
    write_json(out / REPORT_FILE, found)
    return flops + (found.flops_before + found.flops_after) * found.num_samples


def _compress_experts(recipe: Any, given: CompressionContext, out: Path) -> tuple[int, float]:
    """Each expert by itself; how many modules have changed, and the FLOPs."""
    if isinstance(recipe, SiDConfig | ConsistencyConfig | MMDConfig):
        given.check_noise_schedules(recipe.method)
    has_common = isinstance(recipe, SiDConfig) and recipe.shared_warmup_steps > 0
    start, spent = shared_warmup(recipe, given) if has_common else (None, 0.0)

    def make(expert: Expert, own: Workspace) -> ExpertResult:
        if recipe.method in PLAIN:
            return PLAIN[recipe.method](expert, recipe)
        latents = given.data.latents(expert.cluster_id, own)
        if start is not None:
            return distill_sid(expert, latents, recipe, own, start)
        return EXPERT_METHODS[recipe.method](expert, latents, recipe, own)

    done = each_expert(recipe.method, make, given.ensemble, out, given.workspace)
    if isinstance(recipe, WeightOnlyConfig | DynamicInt8Config) and recipe.router and (out / "router").is_dir():
        _pack_router(out / "router", recipe)
    return sum(one.modules for one in done.values()), spent + sum(one.flops for one in done.values())


def _compress_ensemble(recipe: MethodConfig, given: CompressionContext, out: Path) -> tuple[int, float]:
    """All experts at once."""
    found: EnsembleResult = (
        distill_shared_student(recipe, given) if is_dense(recipe) else ENSEMBLE_METHODS[recipe.method](recipe, given)
    )
    if not found.modules:
        raise StageError(f"{recipe.method} found nothing to change, so it would do nothing")
    pipeline = DDMPipeline.from_pretrained(given.ensemble)
    router = pipeline.ensemble.router if found.keeps_router else None
    smaller = replace(pipeline, ensemble=replace(pipeline.ensemble, experts=found.experts, router=router))
    temporary = given.workspace.scratch / "pipeline"
    smaller.save_pretrained(temporary)
    shutil.copytree(temporary, out, dirs_exist_ok=True)
    write_json(
        out / RESULT_FILE, {"modules": found.modules, "flops": found.flops, "details": to_jsonable(found.details)}
    )
    return found.modules, found.flops


def is_dense(recipe: MethodConfig) -> TypeGuard[DistillConfig]:
    """Whether one student is to stand for all experts."""
    return isinstance(recipe, SiDConfig | ConsistencyConfig | MMDConfig) and recipe.students == "shared"


def stage_records(ensemble: Path) -> tuple[str, ...]:
    """What was done to an ensemble already; nothing to the whole one."""
    path = ensemble / REPORT_FILE
    return tuple(read_json(path)["stages"]) if path.exists() else ()


def _pack_router(folder: Path, config: WeightOnlyConfig | DynamicInt8Config) -> None:
    """In place, if it is a network; tables and centroids are small."""
    router = Router.load(folder)
    if pack_all(router.model, config):
        for file in folder.iterdir():
            file.unlink()
        router.save(folder)
