"""Apply a method to every expert, each with the data of its own cluster, and write the resulting ensemble.

Every finished expert is stored in the scratch folder, so a restarted stage continues with the next one.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddm_core.artifacts import Preempted, Workspace, atomic_folder, read_json, to_jsonable, write_json
from ddm_core.files.links import link_or_copy
from ensemble.compression.acceleration.feature_cache import refit_cache
from ensemble.compression.method import ExpertResult, StageError
from ensemble.pipeline import EnsemblePipeline
from experts.expert import Expert
from experts.expert_model import ExpertModel

RESULT_FILE = "outcome.json"

CompressExpert = Callable[[Expert, Workspace], ExpertResult]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRecord:
    """Result of the method for one expert; written as `outcome.json` into the expert's folder."""

    modules: int
    flops: float
    details: Mapping[str, Any]


def compress_each_expert(
    method: str, compress: CompressExpert, ensemble: Path, out: Path, workspace: Workspace
) -> dict[int, ExpertRecord]:
    """Write the ensemble with every expert compressed, and return the record of each.

    Experts that an earlier attempt finished are reused. Raises `StageError` for a kind of expert that has no network of
    its own, and whatever `compress` raises.
    """
    pipeline, records = EnsemblePipeline.from_pretrained(ensemble), {}
    copy_others(ensemble, out)
    count = len(pipeline.ensemble.experts)
    for number, (k, expert) in enumerate(sorted(pipeline.ensemble.experts.items())):
        workspace.report_progress(number, count, unit="experts")
        if workspace.stop_requested():
            raise Preempted(f"stopped after {number} of {count} experts, which are kept")
        finished = workspace.scratch / f"expert_{k}"
        if not finished.exists():
            _save(_compress(method, expert, compress, workspace.part(f"work_{k}")), finished)
        records[k] = ExpertRecord(**read_json(finished / RESULT_FILE))
        if not records[k].modules:
            raise StageError(f"{method} would change nothing in expert {k}; remove the stage or change its settings")
        shutil.copytree(finished, out / f"expert_{k}", copy_function=link_or_copy)
    return records


def _compress(method: str, expert: ExpertModel, compress: CompressExpert, workspace: Workspace) -> ExpertResult:
    """Compress an expert, or each network of an expert that consists of several."""
    if isinstance(expert, Expert):
        result = compress(expert, workspace)
        return replace(result, expert=refit_cache(result.network, expert))
    parts = {name: part for name, part in expert.parts().items() if isinstance(part, Expert)}
    if not parts:
        raise StageError(
            f"{method} works on experts with networks of their own, not on a {type(expert).__name__}; remove the stage"
        )
    results = {name: compress(part, workspace.part(name)) for name, part in parts.items()}
    compressed = expert.with_parts({name: result.network for name, result in results.items()})
    return ExpertResult(
        expert=compressed,
        modules=min(result.modules for result in results.values()),
        flops=sum(result.flops for result in results.values()),
        details={part: result.details for part, result in results.items()},
    )


def copy_others(ensemble: Path, out: Path) -> None:
    """Copy a pipeline's folder without its experts, its manifest and the report of an earlier stage."""
    ignored = shutil.ignore_patterns("manifest.json", "compression.json", "expert_*")
    shutil.copytree(ensemble, out, dirs_exist_ok=True, ignore=ignored)


def _save(result: ExpertResult, folder: Path) -> None:
    """Write an expert and its record, or nothing at all."""
    with atomic_folder(folder) as temporary:
        result.expert.save(temporary)
        record = ExpertRecord(modules=result.modules, flops=result.flops, details=to_jsonable(result.details))
        write_json(temporary / RESULT_FILE, record)
