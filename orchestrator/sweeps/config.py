"""What can be chosen about a sweep, below `hydra.launcher` and `hydra.sweeper`; imports neither Hydra nor Optuna."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import STRICT
from orchestrator.errors import ConfigError

FULL_ERROR = "HYDRA_FULL_ERROR"
"""Environment variable that makes Hydra raise its errors; it is set while a sweep is on, for this process alone."""

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LauncherConfig:
    """`hydra/launcher=ddm_ray`: many runs at once, under one budget."""

    parallel: Annotated[int, Field(ge=1)] | None = None
    """Trials at once; empty takes as many as the budget has CPUs."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptunaConfig:
    """`hydra/sweeper=ddm_optuna`: Optuna chooses the values of every trial."""

    n_trials: Annotated[int, Field(ge=1)] = 20
    """Trials in all, those of earlier calls of the same sweep included."""
    n_jobs: Annotated[int, Field(ge=1)] | None = None
    """Trials at once; empty takes `hydra.launcher.parallel`."""
    direction: Literal["minimize", "maximize"] = "minimize"
    """Which way the metric is better."""
    metric: str = ""
    """A number of the scores, such as `sticky.pixels.fd`; empty takes that of the run's own selection."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the choice; what trial n tries depends on it, on n, and on the scores so far."""
    startup: Annotated[int, Field(ge=0)] = 10
    """Trials that are drawn at random before the Parzen estimator (TPE) chooses."""
    params: dict[str, str] = Field(default_factory=dict)
    """Swept values that stand in a YAML file instead of on the command line."""


def settings(kind: type[Settings], given: Mapping[str, Any], where: str) -> Settings:
    """The typed settings below `where`; raises `ConfigError` with every mistake."""
    try:
        return TypeAdapter(kind).validate_python({key: given[key] for key in given if key != "_target_"})
    except ValidationError as error:
        mistakes = [
            f"{'.'.join([where, *map(str, mistake['loc'])])}: {mistake['msg']} (given: {mistake['input']!r})"
            for mistake in error.errors()
        ]
        raise ConfigError("\n  ".join(mistakes)) from None
