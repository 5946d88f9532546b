"""The state of a run in one word, with what the list of runs and the page of a run show."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import UndefinedError

from ddm_core.errors import DDMError
from orchestrator.config.schema import RunConfig
from orchestrator.errors import RunFolderError
from orchestrator.pipeline.stage import Stage
from orchestrator.reporting.costs import CostRow, format_costs, load_costs, sum_costs
from orchestrator.reporting.progress import format_clock
from orchestrator.reporting.results import current_graph, load_score_rows
from orchestrator.reporting.status import StatusRow, load_status
from orchestrator.reporting.summary import Tile, summary_tiles
from orchestrator.reporting.tables.ranking import ScoreRow
from orchestrator.run.attempts import Attempt, load_all_attempts
from orchestrator.run.lease import read_holder
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.step_samples import StepSamples, find_step_samples
from orchestrator.ui.facts.catalog import RunEntry, last_change
from orchestrator.ui.facts.look import Look, look
from orchestrator.ui.facts.projection import project_costs

FOREIGN = (LookupError, TypeError, ValueError, AttributeError, UndefinedError)
"""Errors of reading records that have another form than those of this version, such as a score without a space."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """What a run has so far."""

    entry: RunEntry
    config: RunConfig
    graph: list[Stage]
    rows: list[StatusRow]
    """One for each stage."""
    state: str
    """`running`, `finished`, `failed`, `stopped`, `waiting`, or `lost` if its controller is gone."""
    controller: str
    """A sentence."""
    attempts: list[Attempt]
    costs: list[CostRow]
    scores: list[ScoreRow]
    headline: tuple[str, float] | None
    """Feature space and Fréchet distance of the default selection; None without its score."""
    changed: float
    """Seconds since the epoch."""

    @property
    def done(self) -> int:
        """Return the number of finished stages."""
        return sum(row.state == "finished" for row in self.rows)

    @property
    def left(self) -> str:
        """Return the longest time that a running stage still needs, as text; empty if none is known."""
        times = [row.progress.left_s for row in self.rows if row.state == "running" and row.progress]
        known = [left for left in times if left]
        return format_clock(max(known)) if known else ""

    @property
    def tiles(self) -> list[Tile]:
        """Return samples, score, cost and time as far as the run has them."""
        return summary_tiles(self.scores, sum_costs(self.costs, "whole run"), self.current_attempts)

    @property
    def current_attempts(self) -> list[Attempt]:
        """Return the attempts at the stages of the present configuration."""
        names = {stage.folder_name for stage in self.graph}
        return [attempt for attempt in self.attempts if attempt.folder.parent.name in names]

    @property
    def cost_line(self) -> str:
        """Return the costs so far as one line; empty before the first attempt."""
        return format_costs(sum_costs(self.costs)) if self.costs else ""

    @property
    def projection(self) -> str:
        """Return the costs at the end of the run as one line; empty if none are known, and for a finished run."""
        projected = project_costs(self.graph, self.rows, self.current_attempts, self.config.compute)
        if not projected.left.seconds:
            return ""
        total = sum_costs([*self.costs, projected.left])
        parts = [f"{format_clock(total.cpu_seconds)} of reserved CPU time"]
        parts += [f"{format_clock(total.gpu_seconds)} of reserved GPU time"] if total.gpu_seconds else []
        parts += [f"price {total.price:.4g}"] if total.price else []
        unknown = f"; without {projected.unknown} stages whose time is not known yet" if projected.unknown else ""
        return " · ".join(parts) + unknown

    @property
    def gallery(self) -> str:
        """Return the name of the stage whose samples stand for the run; empty if none are finished."""
        names = [row.name for row in self.scores if row.is_default] + [row.name for row in self.scores]
        shown = next(iter(names), "")
        return f"score_{shown}" if shown else ""

    @property
    def gallery_stage(self) -> Stage:
        """Return that stage."""
        return self.stage(self.gallery)

    def stage(self, name: str) -> Stage:
        """Return the stage of this name; raises `RunFolderError` if there is none."""
        return find_stage(self.graph, name)

    def has_finished(self, name: str) -> bool:
        """Return whether the stage of this name is finished."""
        return any(row.name == name and row.state == "finished" for row in self.rows)

    @property
    def step_samples(self) -> dict[str, list[StepSamples]]:
        """Return what each expert drew while it trained, in the order of the steps."""
        return {
            stage.name: [*found.values()]
            for stage in self.graph
            if stage.kind == "expert" and (found := find_step_samples(self.entry.run, stage))
        }


def find_stage(graph: Sequence[Stage], name: str) -> Stage:
    """Return the stage of this name; raises `RunFolderError` if there is none."""
    stage = next((stage for stage in graph if stage.name == name), None)
    if stage is None:
        raise RunFolderError(f"this run has no stage {name!r}")
    return stage


@dataclass(frozen=True, slots=True)
class UnreadableRun:
    """A run folder that this version cannot read, and why."""

    entry: RunEntry
    error: str


def load_overview(entry: RunEntry) -> Overview:
    """Read a run; raises `DDMError` if its configuration or a record is damaged or of another version."""
    run = entry.run
    config = run.load_config()
    graph = current_graph(run, config)
    attempts = load_all_attempts(run)
    rows = load_status(run, graph, attempts)
    state, controller = _describe(run, rows)
    scores = load_score_rows(run, graph)
    spaces: dict[str, Any] = next((row.scores["spaces"] for row in scores if row.is_default), {})
    return Overview(
        entry=entry,
        config=config,
        graph=graph,
        rows=rows,
        state=state,
        controller=controller,
        attempts=attempts,
        costs=load_costs(run, attempts),
        scores=scores,
        headline=next(((space, score["fd"]) for space, score in spaces.items()), None),
        changed=last_change(run),
    )


class OverviewCache:
    """Reads several runs, and those again in which files have changed; one that cannot be read is kept as an error."""

    def __init__(self) -> None:
        self._kept: dict[RunEntry, tuple[Look, Overview | UnreadableRun]] = {}

    def load(self, entries: Sequence[RunEntry]) -> list[Overview | UnreadableRun]:
        """Return the runs in the order of `entries`, and forget all others."""
        kept: dict[RunEntry, tuple[Look, Overview | UnreadableRun]] = {}
        for entry in entries:
            now = look(entry.run)
            before = self._kept.get(entry)
            kept[entry] = before if before and before[0] == now else (now, _load_or_explain(entry))
        self._kept = kept
        return [overview for _, overview in kept.values()]


def _load_or_explain(entry: RunEntry) -> Overview | UnreadableRun:
    try:
        return load_overview(entry)
    except (DDMError, OSError) as error:
        return UnreadableRun(entry, str(error))
    except FOREIGN as error:
        return UnreadableRun(entry, describe_foreign(error))


def describe_foreign(error: Exception) -> str:
    """Return the message for an error in `FOREIGN`."""
    return f"A record of this run has another form than this version writes ({type(error).__name__}: {error})."


def _describe(run: RunFolder, rows: Sequence[StatusRow]) -> tuple[str, str]:
    """Return the state of a run in one word and a sentence about its controller."""
    holder = read_holder(run)
    if holder is not None:
        if holder.is_alive:
            return "running", f"Controlled by {holder}."
        return "lost", (
            f"The controller, {holder}, is gone. Nothing is lost: continue with `ddm resume {run.root}`. "
            "Stages that still run keep reporting here."
        )
    states = {row.state for row in rows}
    if states == {"finished"}:
        return "finished", ""
    if "failed" in states:
        failed = ", ".join(row.name for row in rows if row.state == "failed")
        return "failed", f"Failed: {failed}. Its log has the reason; `ddm resume {run.root}` tries again."
    if states == {"waiting"}:
        return "waiting", "Nothing has started yet."
    return "stopped", f"No controller. Continue with `ddm resume {run.root}`."
