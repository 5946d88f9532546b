"""Settings of `ddm run data=image_folder data.path=…` that fit the pictures, this machine and a time budget."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from data_partition.datasets.inspect_folder import FolderFacts, inspect_folder
from orchestrator.config.schema import RunConfig
from orchestrator.errors import ConfigError, RunFolderError
from orchestrator.planning.checks.suggest import Suggestion, name_run, split_overrides, suggest, to_overrides
from orchestrator.run.run_folder import RunFolder

FEW_IMAGES = 1000
FLIP_HINT = " data.flip=true mirrors half of so few pictures; it is off, since text and digits have a direction."

NOT_FITTED = ("data", "data.path", "budget_minutes")
"""Suggestions that only a file of its own needs."""


def fit_overrides(overrides: Sequence[str], console: Console) -> list[str]:
    """Return the overrides after those that fit the pictures, and print these in three lines.

    Nothing is added for other data, beside an experiment, or with `budget_minutes=0`.
    """
    chosen = split_overrides(overrides)
    is_fitted = chosen.get("data") == "image_folder" and "data.path" in chosen and "experiment" not in chosen
    minutes = _read_minutes(chosen.get("budget_minutes"))
    if not is_fitted or minutes == 0:
        return list(overrides)
    path = Path(chosen["data.path"]).expanduser().absolute()
    facts = inspect_folder(str(path))
    steps = _earlier_steps(Path(chosen.get("folder", f"runs/{chosen.get('name', name_run(path))}")), path, minutes)
    fitted = [item for item in suggest(facts, path, minutes, overrides, steps) if item.key not in NOT_FITTED]
    for line in describe(facts, fitted, minutes):
        console.print(Text(line), soft_wrap=True)
    return [*to_overrides(fitted), *overrides]


def describe(facts: FolderFacts, fitted: Sequence[Suggestion], minutes: float) -> list[str]:
    """Return what was found, what was chosen, and how to choose otherwise, a line each."""
    found = [f"{facts.images:,} pictures, most of them {facts.common_size}"]
    found += [f"{facts.grey_share:.0%} grey"] if facts.grey_share else []
    found += [f"{len(facts.class_counts)} classes"] if len(facts.class_counts) > 1 else []
    found += [f"{facts.captions} captions"] if facts.captions else []
    found += [f"{len(facts.bad)} unreadable"] if facts.bad else []
    found += [f"{len(facts.duplicates)} duplicates"] if facts.duplicates else []
    return [
        f"Found {', '.join(found)}.",
        f"Chosen for about {minutes:g} minutes here: {' '.join(to_overrides(fitted)) or 'nothing, all is set'}",
        "Any key on the command line wins; budget_minutes=60 takes longer, budget_minutes=0 keeps the plain defaults."
        + FLIP_HINT * (facts.images < FEW_IMAGES),
    ]


def _read_minutes(text: str | None) -> float:
    try:
        return RunConfig().budget_minutes if text is None else float(text)
    except ValueError:
        raise ConfigError(f"budget_minutes takes a number of minutes, such as 15; got {text!r}") from None


def _earlier_steps(folder: Path, path: Path, minutes: float) -> int | None:
    """Return the steps of this folder's run on the same pictures and budget, so that it goes on with its settings."""
    run = RunFolder(folder.expanduser())
    if not run.config_file.is_file():
        return None
    try:
        config = run.load_config()
    except (ConfigError, RunFolderError):
        return None
    is_same = config.data.path == str(path) and config.budget_minutes == minutes
    return config.expert.training.steps if is_same else None
