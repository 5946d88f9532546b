"""One stage: its method on every expert, or on all at once, and the comparison with the whole ensemble.

To add a method, write it, give it a configuration in `config.py` and a row here.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from ddm_core.artifacts import Workspace, plain, read_json, write_json
from ensemble.compression.acceleration.diffusers_hooks import hook_all
from ensemble.compression.acceleration.feature_cache import cache_all
from ensemble.compression.acceleration.truncated_start import truncate
from ensemble.compression.config import ComputeConfig, DistillConfig, RecipeConfig, StageConfig, WeightsConfig, label_of
from ensemble.compression.distillation.config import ConsistencyConfig, MMDConfig, SiDConfig
from ensemble.compression.distillation.consistency import consistency
from ensemble.compression.distillation.mmd import mmd
from ensemble.compression.distillation.shared_student import common_start, dense_student
from ensemble.compression.distillation.sid import sid
from ensemble.compression.handover import base_first, switch
from ensemble.compression.measurement import COMPRESSION, compare
from ensemble.compression.method import Clusters, Given, Method, Outcome, StageError, Together, TogetherMethod
from ensemble.compression.per_expert import OUTCOME, each_expert
from ensemble.compression.pruning.ecodiff import ecodiff
from ensemble.compression.pruning.laptop import laptop
from ensemble.compression.quantization.mixed_precision import allot_all
from ensemble.compression.quantization.quest import quest
from ensemble.compression.quantization.shared_base import share_all
from ensemble.compression.quantization.svdquant import svdquant
from ensemble.compression.quantization.weight_only import compute_int8, pack_all, pack_expert
from ensemble.pipeline import DDMPipeline
from experts.expert import Expert
from router.router import Router

PLAIN: dict[str, Callable[[Expert, Any], Outcome]] = {"weights": pack_expert, "compute": compute_int8}
"""By name: what is done to each expert by itself, without data."""
METHODS: dict[str, Method] = {
    "sid": sid,
    "consistency": consistency,
    "mmd": mmd,
    "laptop": laptop,
    "ecodiff": ecodiff,
    "svdquant": svdquant,
    "quest": quest,
}
"""The same with the latents of its own cluster."""
TOGETHER: dict[str, TogetherMethod] = {
    "cache": cache_all,
    "hook": hook_all,
    "truncate": truncate,
    "base_first": base_first,
    "share": share_all,
    "bits": allot_all,
    "switch": switch,
}
"""What is done to all of them at once."""


def run_stage(
    config: StageConfig, ensemble: Path, whole: Path, clusters: Sequence[Path], out: Path, workspace: Workspace
) -> float:
    """Write the smaller ensemble and `compression.json` to `out`, and return the FLOPs of making and comparing it.

    `clusters` are the experts' own shards, in the order of their ids. Raises what the methods raise.
    """
    is_one = len(clusters) > 1 and not (ensemble / "router").is_dir()
    data = Clusters(folders=clusters, codec=ensemble / "codec", labelled=config.labelled, is_one=is_one)
    given = Given(ensemble=ensemble, whole=whole, data=data, sampling=config.sampling, workspace=workspace)
    if config.recipe.method in TOGETHER or is_dense(config.recipe):
        modules, flops = _together(config.recipe, given, out)
    else:
        modules, flops = _apart(config.recipe, given, out)
    stages = (*stages_of(ensemble), label_of(config.recipe))
    found = compare(stages, modules, whole, out, config.sampling, config.num_samples, workspace)
    write_json(out / COMPRESSION, found)
    return flops + (found.flops_before + found.flops_after) * found.num_samples


def _apart(recipe: Any, given: Given, out: Path) -> tuple[int, float]:
    """Each expert by itself; how many modules have changed, and the FLOPs."""
    if isinstance(recipe, SiDConfig | ConsistencyConfig | MMDConfig):
        given.check_paths(recipe.method)
    has_common = isinstance(recipe, SiDConfig) and recipe.common_steps > 0
    start, spent = common_start(recipe, given) if has_common else (None, 0.0)

    def make(expert: Expert, own: Workspace) -> Outcome:
        if recipe.method in PLAIN:
            return PLAIN[recipe.method](expert, recipe)
        latents = given.data.latents(expert.cluster_id, own)
        if start is not None:
            return sid(expert, latents, recipe, own, start)
        return METHODS[recipe.method](expert, latents, recipe, own)

    done = each_expert(recipe.method, make, given.ensemble, out, given.workspace)
    if isinstance(recipe, WeightsConfig | ComputeConfig) and recipe.router and (out / "router").is_dir():
        _pack_router(out / "router", recipe)
    return sum(one.modules for one in done.values()), spent + sum(one.flops for one in done.values())


def _together(recipe: RecipeConfig, given: Given, out: Path) -> tuple[int, float]:
    """All experts at once."""
    found: Together = dense_student(recipe, given) if is_dense(recipe) else TOGETHER[recipe.method](recipe, given)
    if not found.modules:
        raise StageError(f"{recipe.method} found nothing to change, so it would do nothing")
    pipeline = DDMPipeline.from_pretrained(given.ensemble)
    router = pipeline.ensemble.router if found.keeps_router else None
    smaller = replace(pipeline, ensemble=replace(pipeline.ensemble, experts=found.experts, router=router))
    temporary = given.workspace.scratch / "pipeline"
    smaller.save_pretrained(temporary)
    shutil.copytree(temporary, out, dirs_exist_ok=True)
    write_json(out / OUTCOME, {"modules": found.modules, "flops": found.flops, "details": plain(found.details)})
    return found.modules, found.flops


def is_dense(recipe: RecipeConfig) -> TypeGuard[DistillConfig]:
    """Whether one student is to stand for all experts."""
    return isinstance(recipe, SiDConfig | ConsistencyConfig | MMDConfig) and recipe.students == "one"


def stages_of(ensemble: Path) -> tuple[str, ...]:
    """What was done to an ensemble already; nothing to the whole one."""
    path = ensemble / COMPRESSION
    return tuple(read_json(path)["stages"]) if path.exists() else ()


def _pack_router(folder: Path, config: WeightsConfig | ComputeConfig) -> None:
    """In place, if it is a network; tables and centroids are small."""
    router = Router.load(folder)
    if pack_all(router.model, config):
        for file in folder.iterdir():
            file.unlink()
        router.save(folder)
