"""A stage on a whole ensemble: its method on every expert, each with its own cluster, and the folder that results."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddm_core.artifacts import Preempted, Workspace, atomic_folder, read_json, to_jsonable, write_json
from ensemble.compression.acceleration.feature_cache import refit_cache
from ensemble.compression.method import ExpertResult, StageError
from ensemble.ensemble import ExpertModel
from ensemble.multi_network_experts import TimeSplitExpert, TruncatedExpert
from ensemble.pipeline import DDMPipeline
from experts.expert import Expert

RESULT_FILE = "outcome.json"

Make = Callable[[Expert, Workspace], ExpertResult]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRecord:
    """What the method did to one expert; written as `outcome.json` into that expert's folder."""

    modules: int
    flops: float
    details: Mapping[str, Any]


def each_expert(name: str, make: Make, ensemble: Path, out: Path, space: Workspace) -> dict[int, ExpertRecord]:
    """Write the ensemble with every expert replaced by what was made of it, and say what was done.

    An expert that an earlier attempt finished is not made again. Raises `StageError` for one network that is told its
    cluster, and whatever `make` raises.
    """
    pipeline, done = DDMPipeline.from_pretrained(ensemble), {}
    copy_others(ensemble, out)
    for number, (k, expert) in enumerate(sorted(pipeline.ensemble.experts.items())):
        space.report_progress(number, len(pipeline.ensemble.experts), unit="experts")
        if space.stop_requested():
            raise Preempted(f"stopped after {number} of {len(pipeline.ensemble.experts)} experts, which are kept")
        kept = space.scratch / f"expert_{k}"
        if not kept.exists():
            _keep(_apply_method(name, expert, make, space.part(f"work_{k}")), kept)
        done[k] = ExpertRecord(**read_json(kept / RESULT_FILE))
        if not done[k].modules:
            raise StageError(f"{name} found nothing to change in expert {k}, so it would do nothing")
        shutil.copytree(kept, out / f"expert_{k}")
    return done


def _apply_method(name: str, expert: ExpertModel, make: Make, space: Workspace) -> ExpertResult:
    """What is made of an expert, or of each network of one that consists of several."""
    if isinstance(expert, Expert):
        outcome = make(expert, space)
        return replace(outcome, expert=refit_cache(outcome.network, expert))
    if isinstance(expert, TimeSplitExpert):
        outcomes = {str(number): make(one, space.part(str(number))) for number, one in enumerate(expert.networks)}
        made: ExpertModel = replace(expert, networks=[outcome.network for outcome in outcomes.values()])
    elif isinstance(expert, TruncatedExpert):
        networks = {"refiner": expert.refiner} | ({"draft": expert.draft} if isinstance(expert.draft, Expert) else {})
        outcomes = {part: make(one, space.part(part)) for part, one in networks.items()}
        made = replace(expert, **{part: outcome.network for part, outcome in outcomes.items()})
    else:
        raise StageError(f"{name} works on experts of their own, and this one is a {type(expert).__name__}")
    return ExpertResult(
        expert=made,
        modules=min(outcome.modules for outcome in outcomes.values()),
        flops=sum(outcome.flops for outcome in outcomes.values()),
        details={part: outcome.details for part, outcome in outcomes.items()},
    )


def copy_others(ensemble: Path, out: Path) -> None:
    """Copy everything of a pipeline's folder but its experts, manifest and the result of an earlier stage."""
    ignored = shutil.ignore_patterns("manifest.json", "compression.json", "expert_*")
    shutil.copytree(ensemble, out, dirs_exist_ok=True, ignore=ignored)


def _keep(outcome: ExpertResult, folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        outcome.expert.save(temporary)
        done = ExpertRecord(modules=outcome.modules, flops=outcome.flops, details=to_jsonable(outcome.details))
        write_json(temporary / RESULT_FILE, done)
