"""What would cross between home and the islands: inputs out, models back; nothing ever goes from island to island."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddm_core.artifacts import files_in
from orchestrator.config.compute import CONTROLLER
from orchestrator.pipeline.stage import Input, Stage
from orchestrator.planning.simulate import PlannedExecution
from orchestrator.run.run_folder import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Bytes that one stage moves; None is not known yet."""

    bytes_out: int | None = 0
    """To the island; what an earlier stage has brought there is not sent again."""
    bytes_in: int | None = 0
    """Back: the artifact. Checkpoints come only from attempts that did not finish."""


def estimate_transfers(
    run: RunFolder, graph: Sequence[Stage], visits: Sequence[PlannedExecution], sizes: Mapping[str, int]
) -> dict[str, Transfer]:
    """Of every visit, by the stage's name; exact for inputs that are finished, else by `sizes` of a calibration."""
    by_name = {stage.name: stage for stage in graph}
    sent: set[tuple[str, str]] = set()
    found = {}
    for visit in visits:
        moved = Transfer()
        if visit.place != CONTROLLER:
            inputs = {name_of(given): given for given in by_name[visit.stage].inputs.values()}
            new = [given for name, given in inputs.items() if (visit.place, name) not in sent]
            sent |= {(visit.place, name) for name in inputs}
            moved = Transfer(
                bytes_out=_sum([_size(run, given, sizes) for given in new]), bytes_in=sizes.get(visit.stage)
            )
        found[visit.stage] = moved
    return found


def name_of(given: Input) -> str:
    """`<stage>` or `<stage>/<part>`."""
    return f"{given.stage.name}/{given.part}".rstrip("/")


def folder_bytes(folder: Path) -> int:
    """How large the files below a folder are together."""
    return sum(path.stat().st_size for path in files_in(folder))


def _size(run: RunFolder, given: Input, sizes: Mapping[str, int]) -> int | None:
    if run.finished(given.stage):
        return folder_bytes(run.input(given))
    return sizes.get(name_of(given))


def _sum(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
