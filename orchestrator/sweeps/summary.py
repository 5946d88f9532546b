"""The results of a sweep: `sweep.json`, a chart, and a table for the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ddm_core.artifacts import write_json, write_text
from orchestrator.sweeps.display import rank_trials, ranking_table
from orchestrator.sweeps.trial import TrialEnd


def write_summary(folder: Path, ends: Sequence[TrialEnd], metric: str, *, maximize: bool) -> None:
    """Write `sweep.json`: every trial with its values and its score, and the best one."""
    scored = [end for end in rank_trials(ends, maximize=maximize) if end.score is not None]
    write_json(
        folder / "sweep.json",
        {
            "metric": metric,
            "direction": "maximize" if maximize else "minimize",
            "best": _entry(scored[0]) if scored else None,
            "trials": [_entry(end) for end in sorted(ends, key=lambda end: end.trial.number)],
        },
    )


def show_summary(console: Console, folder: Path, ends: Sequence[TrialEnd], metric: str, *, maximize: bool) -> None:
    """Write `sweep.json` and the chart; print the table."""
    write_summary(folder, ends, metric, maximize=maximize)
    scores = [
        (float(end.trial.number), end.score)
        for end in sorted(ends, key=lambda end: end.trial.number)
        if end.score is not None
    ]
    if scores:
        from orchestrator.reporting.charts import trial_chart

        write_text(folder / "sweep.svg", trial_chart(scores, metric, maximize=maximize))
        console.print(ranking_table(ends, metric, maximize=maximize))
    console.print(f"Summary: {folder / 'sweep.json'}", soft_wrap=True, highlight=False)


def _entry(end: TrialEnd) -> dict[str, Any]:
    trial = end.trial
    return {
        "number": trial.number,
        "label": trial.label,
        "values": trial.parameters,
        "state": end.state,
        "score": end.score,
        "error": end.error,
    }
