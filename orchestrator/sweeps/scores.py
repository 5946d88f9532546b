"""The metric by which the trials of a sweep are compared."""

import math

from orchestrator.config.schema import RunConfig
from orchestrator.errors import ConfigError
from orchestrator.reporting.results import current_graph, load_score_rows
from orchestrator.run.run_folder import RunFolder
from router.config import selection_label


def default_metric(config: RunConfig) -> str:
    """Return the name of the Fréchet distance of the run's own selection in its first feature space."""
    return f"{selection_label(config.ensemble.selection)}.{config.scores.spaces[0]}.fd"


def check_metric(metric: str, config: RunConfig) -> None:
    """Raise `ConfigError` if the metric belongs to a row that the run will not score."""
    rows = [selection_label(selection) for selection in (config.ensemble.selection, *config.scores.selections)]
    known = dict.fromkeys([*rows, *(["monolith"] if config.has_monolith else []), *config.baselines])
    if not any(metric.startswith(f"{row}.") for row in known):
        raise ConfigError(
            f"hydra.sweeper.metric must start with a scored row ({', '.join(known)}); got {metric!r}; use one "
            f"such as {default_metric(config)}"
        )


def load_score_values(run: RunFolder, config: RunConfig) -> dict[str, float]:
    """Load all numbers of a run's scores, such as `sticky.efficientnet_lite0.fd` or `monolith.calls_per_step`."""
    values: dict[str, float] = {}
    for row in load_score_rows(run, current_graph(run, config)):
        groups = {f"{row.name}.{space}": scores for space, scores in row.scores["spaces"].items()}
        for prefix, group in {row.name: row.scores, **groups}.items():
            values |= {
                f"{prefix}.{key}": float(value) for key, value in group.items() if isinstance(value, int | float)
            }
    return values


def load_score(run: RunFolder, config: RunConfig, metric: str) -> float | None:
    """Load a run's score; an empty metric means the default, None that the run has no such finite number."""
    score = load_score_values(run, config).get(metric or default_metric(config), math.nan)
    return score if math.isfinite(score) else None
