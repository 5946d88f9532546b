"""One stage: its method on every expert, or on all at once, and the comparison with the whole ensemble.

To add a method, write it, give it a configuration in `config.py` and a row here.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from artifacts import Workspace, read_json, write_json
from ensemble.ensemble import Speaker
from ensemble.pipeline import DDMPipeline
from ensemble.stages.bits import allot_bits
from ensemble.stages.bits_config import BitsConfig
from ensemble.stages.comparison import COMPRESSION, compare
from ensemble.stages.config import ComputeConfig, StageConfig, SwitchConfig, WeightsConfig, label_of
from ensemble.stages.ecodiff import ecodiff
from ensemble.stages.laptop import laptop
from ensemble.stages.method import Method, Outcome
from ensemble.stages.parts import OUTCOME, each_expert
from ensemble.stages.quest import quest
from ensemble.stages.share import share
from ensemble.stages.share_config import ShareConfig
from ensemble.stages.svdquant import svdquant
from ensemble.stages.switch import switched
from ensemble.stages.weights import compute_int8, pack_all, pack_expert
from experts.codecs import load_codec
from experts.expert import Expert
from experts.latents import LatentDataset, encode_latents
from router.router import Router

PLAIN: dict[str, Callable[[Expert, Any], Outcome]] = {"weights": pack_expert, "compute": compute_int8}
"""By name: what is done to each expert by itself, without data."""
METHODS: dict[str, Method] = {"laptop": laptop, "ecodiff": ecodiff, "svdquant": svdquant, "quest": quest}
"""The same with the latents of its own cluster. `share`, `bits` and `switch` look at several experts at once."""


def run_stage(
    config: StageConfig, ensemble: Path, whole: Path, clusters: Sequence[Path], out: Path, workspace: Workspace
) -> float:
    """Write the smaller ensemble and `compression.json` to `out`, and return the FLOPs of making and comparing it.

    `clusters` are the experts' own shards, in the order of their ids. Raises what the methods raise.
    """
    data = Clusters(folders=clusters, codec=ensemble / "codec", labelled=config.labelled)
    if isinstance(config.recipe, ShareConfig | BitsConfig | SwitchConfig):
        modules, flops = _together(config.recipe, ensemble, whole, data, out, workspace)
    else:
        modules, flops = _apart(config.recipe, ensemble, data, out, workspace)
    stages = (*stages_of(ensemble), label_of(config.recipe))
    found = compare(stages, modules, whole, out, config.sampling, config.num_samples, workspace)
    write_json(out / COMPRESSION, found)
    return flops + (found.flops_before + found.flops_after) * found.num_samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Clusters:
    """Where the experts' own data are."""

    folders: Sequence[Path]
    codec: Path
    labelled: bool

    def latents(self, k: int, workspace: Workspace) -> LatentDataset:
        """Those of one expert's cluster."""
        found = encode_latents([self.folders[k]], load_codec(self.codec), self.codec, workspace)
        return found if self.labelled else found.unlabelled()


def _apart(recipe: Any, ensemble: Path, data: Clusters, out: Path, workspace: Workspace) -> tuple[int, float]:
    """Each expert by itself; how many modules have changed, and the FLOPs."""

    def make(expert: Expert, own: Workspace) -> Outcome:
        if recipe.method in PLAIN:
            return PLAIN[recipe.method](expert, recipe)
        return METHODS[recipe.method](expert, data.latents(expert.cluster_id, own), recipe, own)

    done = each_expert(recipe.method, make, ensemble, out, workspace)
    if isinstance(recipe, WeightsConfig | ComputeConfig) and recipe.router and (out / "router").is_dir():
        _pack_router(out / "router", recipe)
    return sum(one.modules for one in done.values()), sum(one.flops for one in done.values())


def _together(
    recipe: ShareConfig | BitsConfig | SwitchConfig,
    ensemble: Path,
    whole: Path,
    data: Clusters,
    out: Path,
    workspace: Workspace,
) -> tuple[int, float]:
    """All experts at once."""
    pipeline = DDMPipeline.from_pretrained(ensemble)
    if isinstance(recipe, SwitchConfig):
        made: Mapping[int, Speaker] = switched(recipe, ensemble, whole)
        modules, flops, details = len(made), 0.0, {}
    else:
        experts = {k: expert for k, expert in pipeline.ensemble.experts.items() if isinstance(expert, Expert)}
        if isinstance(recipe, ShareConfig):
            found = share(experts, recipe, workspace)
        else:
            found = allot_bits(experts, {k: data.latents(k, workspace) for k in experts}, recipe, workspace)
        made, modules, flops, details = found.experts, found.modules, found.flops, dict(found.details)
    smaller = replace(pipeline, ensemble=replace(pipeline.ensemble, experts=made))
    smaller.save_pretrained(workspace.scratch / "pipeline")
    shutil.copytree(workspace.scratch / "pipeline", out, dirs_exist_ok=True)
    write_json(out / OUTCOME, {"modules": modules, "flops": flops, "details": details})
    return modules, flops


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
