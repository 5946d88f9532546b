"""Bytes between controller and islands: inputs go out, models come back; islands exchange nothing with each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddm_core.artifacts import list_files
from orchestrator.config.compute import CONTROLLER
from orchestrator.pipeline.stage import Input, Stage
from orchestrator.planning.simulate import PlannedExecution
from orchestrator.run.run_folder import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Bytes that one stage transfers; None is unknown."""

    bytes_out: int | None = 0
    """To the island; inputs that an earlier stage needed there are not sent again."""
    bytes_in: int | None = 0
    """From the island: the artifact. Only attempts that did not finish also send checkpoints."""


def estimate_transfers(
    run: RunFolder, graph: Sequence[Stage], executions: Sequence[PlannedExecution], sizes: Mapping[str, int]
) -> dict[str, Transfer]:
    """Return each execution's transfer by stage name; exact for finished inputs, else by a calibration's `sizes`."""
    by_name = {stage.name: stage for stage in graph}
    sent: set[tuple[str, str]] = set()
    transfers = {}
    for execution in executions:
        transfer = Transfer()
        if execution.place != CONTROLLER:
            inputs = {input_name(artifact): artifact for artifact in by_name[execution.stage].inputs.values()}
            unsent = [artifact for name, artifact in inputs.items() if (execution.place, name) not in sent]
            sent |= {(execution.place, name) for name in inputs}
            transfer = Transfer(
                bytes_out=_sum([_input_bytes(run, artifact, sizes) for artifact in unsent]),
                bytes_in=sizes.get(execution.stage),
            )
        transfers[execution.stage] = transfer
    return transfers


def input_name(artifact: Input) -> str:
    """Return `<stage>` or `<stage>/<part>`."""
    return f"{artifact.stage.name}/{artifact.part}".rstrip("/")


def folder_bytes(folder: Path) -> int:
    """Sum the sizes of all files inside a folder."""
    return sum(path.stat().st_size for path in list_files(folder))


def _input_bytes(run: RunFolder, artifact: Input, sizes: Mapping[str, int]) -> int | None:
    if run.is_finished(artifact.stage):
        return folder_bytes(run.input_folder(artifact))
    return sizes.get(input_name(artifact))


def _sum(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
