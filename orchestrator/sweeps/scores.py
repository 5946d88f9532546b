"""The one number by which the trials of a sweep are compared."""

import math

from orchestrator.config.schema import RunConfig
from orchestrator.errors import ConfigError
from orchestrator.reporting.results import current_graph, score_rows
from orchestrator.run.run_folder import RunFolder
from router.config import selection_label


def default_metric(config: RunConfig) -> str:
    """The Fréchet distance of the run's own selection in its first feature space."""
    return f"{selection_label(config.ensemble.selection)}.{config.scores.spaces[0]}.fd"


def refuse_unknown_rows(metric: str, config: RunConfig) -> None:
    """Raise `ConfigError` if the metric belongs to a row that the run will not score; before anything runs."""
    rows = [selection_label(selection) for selection in (config.ensemble.selection, *config.scores.selections)]
    known = [*dict.fromkeys(rows), *(["monolith"] if config.monolith else []), *config.baselines]
    if not any(metric.startswith(f"{row}.") for row in known):
        raise ConfigError(
            f"metric {metric!r} is no score of this run: it begins with one of its rows ({', '.join(known)}), such as "
            f"{default_metric(config)}"
        )


def numbers(run: RunFolder, config: RunConfig) -> dict[str, float]:
    """Every number that the run was scored with, such as `sticky.pixels.fd` or `monolith.nn_ratio`."""
    found: dict[str, float] = {}
    for row in score_rows(run, current_graph(run, config)):
        groups = {f"{row.name}.{space}": scores for space, scores in row.scores["spaces"].items()}
        for prefix, group in {row.name: row.scores, **groups}.items():
            found |= {f"{prefix}.{key}": float(value) for key, value in group.items() if isinstance(value, int | float)}
    return found


def score_of(run: RunFolder, config: RunConfig, metric: str) -> float | None:
    """The run's score; empty takes the default metric, None says that the run does not have it as a finite number."""
    score = numbers(run, config).get(metric or default_metric(config), math.nan)
    return score if math.isfinite(score) else None
