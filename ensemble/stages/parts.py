"""A stage on a whole ensemble: its method on every expert, each with its own cluster, and the folder that results."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts import Preempted, Workspace, plain, read_json, replaced_folder, write_json
from ensemble.pipeline import DDMPipeline
from ensemble.stages.method import Outcome, StageError
from experts.expert import Expert

OUTCOME = "outcome.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What the method did to one expert; written as `outcome.json` into that expert's folder."""

    modules: int
    flops: float
    details: Mapping[str, Any]


def each_expert(
    name: str, make: Callable[[Expert, Workspace], Outcome], ensemble: Path, out: Path, space: Workspace
) -> dict[int, Done]:
    """Write the ensemble with every expert replaced by what was made of it, and say what was done.

    An expert that an earlier attempt finished is not made again. Raises `StageError` for one network that is told its
    cluster, and whatever `make` raises.
    """
    pipeline, done = DDMPipeline.from_pretrained(ensemble), {}
    copy_others(ensemble, out)
    for number, (k, expert) in enumerate(sorted(pipeline.ensemble.experts.items())):
        space.report(number, len(pipeline.ensemble.experts), unit="experts")
        if space.stop_requested():
            raise Preempted(f"stopped after {number} of {len(pipeline.ensemble.experts)} experts, which are kept")
        if not isinstance(expert, Expert):
            raise StageError(f"{name} works on experts of their own, and expert {k} is a {type(expert).__name__}")
        kept = space.scratch / f"expert_{k}"
        if not kept.exists():
            _keep(make(expert, _own(space, k)), kept)
        done[k] = Done(**read_json(kept / OUTCOME))
        if not done[k].modules:
            raise StageError(f"{name} found nothing to change in expert {k}, so it would do nothing")
        shutil.copytree(kept, out / f"expert_{k}")
    return done


def copy_others(ensemble: Path, out: Path) -> None:
    """Copy everything of a pipeline's folder but its experts, manifest and the result of an earlier stage."""
    ignored = shutil.ignore_patterns("manifest.json", "compression.json", "expert_*")
    shutil.copytree(ensemble, out, dirs_exist_ok=True, ignore=ignored)


def _own(space: Workspace, k: int) -> Workspace:
    """The part of a workspace that belongs to one expert."""
    scratch = space.scratch / f"work_{k}"
    scratch.mkdir(parents=True, exist_ok=True)
    return Workspace(scratch, space.attempt, space.stop_files, space.stopping)


def _keep(outcome: Outcome, folder: Path) -> None:
    with replaced_folder(folder) as temporary:
        outcome.expert.save(temporary)
        done = Done(modules=outcome.modules, flops=outcome.flops, details=plain(outcome.details))
        write_json(temporary / OUTCOME, done)
