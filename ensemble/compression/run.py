"""Run one compression stage: apply its method to the experts, and compare the result with the original ensemble.

To add a method, write it, give it a configuration in `config.py` and a row in one of the three tables here.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from torch import nn

from ddm_core.artifacts import Workspace, read_json, to_jsonable, write_json
from ddm_core.files.links import link_or_copy
from ensemble.compression.acceleration.diffusers_hooks import hook_all
from ensemble.compression.acceleration.feature_cache import cache_all
from ensemble.compression.acceleration.truncated_start import truncate
from ensemble.compression.config import (
    AnyDistillConfig,
    CompressionConfig,
    DistillConfig,
    DynamicInt8Config,
    MethodConfig,
    WeightOnlyConfig,
    compression_label,
)
from ensemble.compression.distillation.config import WarmedConfig
from ensemble.compression.distillation.consistency import train_consistency
from ensemble.compression.distillation.mean_flow import train_mean_flow
from ensemble.compression.distillation.mmd import finetune_mmd
from ensemble.compression.distillation.scm import train_scm
from ensemble.compression.distillation.shared_student import distill_shared_student, train_shared_warmup
from ensemble.compression.distillation.sid import distill_sid
from ensemble.compression.distillation.sign import train_sign
from ensemble.compression.distillation.speedup import train_speedup
from ensemble.compression.handover import hand_over_after_base, stitch
from ensemble.compression.measurement import compare
from ensemble.compression.method import (
    Clusters,
    CompressionContext,
    EnsembleMethod,
    EnsembleResult,
    ExpertResult,
    Method,
    StageError,
)
from ensemble.compression.per_expert import RESULT_FILE, compress_each_expert
from ensemble.compression.pruning.assembly import prune_assembly
from ensemble.compression.pruning.ecodiff import prune_ecodiff
from ensemble.compression.pruning.laptop import prune_laptop
from ensemble.compression.pruning.regional import prune_regional
from ensemble.compression.quantization.learngenes import quantize_learngenes
from ensemble.compression.quantization.mixed_precision import quantize_mixed_precision
from ensemble.compression.quantization.quest import quantize_quest
from ensemble.compression.quantization.shared_base import quantize_shared_base
from ensemble.compression.quantization.svdquant import quantize_svdquant
from ensemble.compression.quantization.weight_only import pack_all, quantize_dynamic_int8, quantize_weights
from ensemble.compression.report import REPORT_FILE
from ensemble.pipeline import EnsemblePipeline
from experts.conditions.text_encoder import read_text_config
from experts.expert import Expert
from experts.training.latent_dataset import LatentDataset
from router.router import Router

WARMED_METHODS: dict[str, Callable[[Expert, LatentDataset, Any, Workspace, nn.Module | None], ExpertResult]] = {
    "sid": distill_sid,
    "consistency": train_consistency,
}
"""Methods whose students may start from another network, by name."""
DATA_FREE_METHODS: dict[str, Callable[[Expert, Any], ExpertResult]] = {
    "weight_only": quantize_weights,
    "dynamic_int8": quantize_dynamic_int8,
}
"""Methods that compress each expert separately and need no data, by name."""
EXPERT_METHODS: dict[str, Method] = {
    "sid": distill_sid,
    "consistency": train_consistency,
    "mmd": finetune_mmd,
    "mean_flow": train_mean_flow,
    "scm": train_scm,
    "sign": train_sign,
    "speedup": train_speedup,
    "laptop": prune_laptop,
    "ecodiff": prune_ecodiff,
    "assembly": prune_assembly,
    "regional": prune_regional,
    "svdquant": quantize_svdquant,
    "quest": quantize_quest,
}
"""Methods that compress each expert separately with the latents of its cluster, by name."""
ENSEMBLE_METHODS: dict[str, EnsembleMethod] = {
    "cache": cache_all,
    "hook": hook_all,
    "truncate": truncate,
    "base_first": hand_over_after_base,
    "shared_base": quantize_shared_base,
    "learngenes": quantize_learngenes,
    "mixed_precision": quantize_mixed_precision,
    "stitch": stitch,
}
"""Methods that compress all experts at once, by name."""


def run_stage(
    config: CompressionConfig,
    ensemble: Path,
    original: Path,
    clusters: Sequence[Path],
    out: Path,
    workspace: Workspace,
    held_out: Sequence[Path] = (),
) -> float:
    """Write the compressed ensemble and `compression.json` to `out`; return the FLOPs of compressing and comparing.

    `clusters` are the experts' own shards, `held_out` their held-out latents, by their ids. Raises what the methods
    raise.
    """
    data = replace(open_clusters(clusters, ensemble, labeled=config.labelled), held_out=held_out)
    context = CompressionContext(
        ensemble=ensemble, original=original, data=data, sampling=config.sampling, workspace=workspace
    )
    if config.method.method in ENSEMBLE_METHODS or trains_shared_student(config.method):
        modules, flops, notes = _compress_ensemble(config.method, context, out)
    else:
        modules, flops, notes = *_compress_experts(config.method, context, out), ()
    stages = (*read_stages(ensemble), compression_label(config.method))
    report = replace(compare(stages, modules, (original, out), data, config, workspace), notes=notes)
    write_json(out / REPORT_FILE, report)
    return flops + sum((cost.flops_before + cost.flops_after) * cost.batch_size for cost in report.served)


def open_clusters(folders: Sequence[Path], ensemble: Path, *, labeled: bool) -> Clusters:
    """Return the access to the latents of the clusters of a pipeline's experts."""
    return Clusters(
        folders=folders,
        codec=ensemble / "codec",
        labeled=labeled,
        reads_text=read_text_config(ensemble) is not None,
        is_single_network=len(folders) > 1 and not (ensemble / "router").is_dir(),
    )


def _compress_experts(method: Any, context: CompressionContext, out: Path) -> tuple[int, float]:
    """Compress each expert separately; return the number of changed modules, and the FLOPs."""
    if isinstance(method, AnyDistillConfig):
        context.check_noise_schedules(method.method)
    has_warmup = isinstance(method, WarmedConfig) and method.shared_warmup_steps > 0
    warmup = train_shared_warmup(method, context) if has_warmup else None

    def compress(expert: Expert, workspace: Workspace) -> ExpertResult:
        if method.method in DATA_FREE_METHODS:
            return DATA_FREE_METHODS[method.method](expert, method)
        latents = context.data.load_latents(expert.cluster_id, workspace)
        if warmup is not None:
            return WARMED_METHODS[method.method](expert, latents, method, workspace, warmup.start_of(expert, method))
        return EXPERT_METHODS[method.method](expert, latents, method, workspace)

    records = compress_each_expert(method.method, compress, context.ensemble, out, context.workspace).values()
    if isinstance(method, WeightOnlyConfig | DynamicInt8Config) and method.router and (out / "router").is_dir():
        _pack_router(out / "router", method)
    return sum(record.modules for record in records), sum(
        (record.flops for record in records), warmup.flops if warmup else 0.0
    )


def _compress_ensemble(
    method: MethodConfig, context: CompressionContext, out: Path
) -> tuple[int, float, tuple[str, ...]]:
    """Compress all experts at once; return the number of changed modules, the FLOPs, and the notes."""
    result: EnsembleResult = (
        distill_shared_student(method, context)
        if trains_shared_student(method)
        else ENSEMBLE_METHODS[method.method](method, context)
    )
    if not result.modules:
        raise StageError(f"{method.method} would change nothing; remove the stage or change its settings")
    pipeline = EnsemblePipeline.from_pretrained(context.ensemble)
    router = pipeline.ensemble.router if result.keeps_router else None
    compressed = replace(pipeline, ensemble=replace(pipeline.ensemble, experts=result.experts, router=router))
    temporary = context.workspace.scratch / "pipeline"
    compressed.save_pretrained(temporary)
    shutil.copytree(temporary, out, dirs_exist_ok=True, copy_function=link_or_copy)
    write_json(
        out / RESULT_FILE, {"modules": result.modules, "flops": result.flops, "details": to_jsonable(result.details)}
    )
    return result.modules, result.flops, result.notes


def trains_shared_student(method: MethodConfig) -> TypeGuard[DistillConfig]:
    """Return whether one student replaces all experts."""
    return isinstance(method, AnyDistillConfig) and method.students == "shared"


def read_stages(ensemble: Path) -> tuple[str, ...]:
    """Return the labels of the stages that an ensemble has passed; empty for the original."""
    path = ensemble / REPORT_FILE
    return tuple(read_json(path)["stages"]) if path.exists() else ()


def _pack_router(folder: Path, config: WeightOnlyConfig | DynamicInt8Config) -> None:
    """Quantize the weights of a router in place; routers of tables or centroids have no large weights and stay."""
    router = Router.load(folder)
    if pack_all(router.model, config):
        for file in folder.iterdir():
            file.unlink()
        router.save(folder)
