"""Settings of a sweep, below `hydra.launcher` and `hydra.sweeper`; imports neither Hydra nor Optuna."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import STRICT
from orchestrator.errors import ConfigError

FULL_ERROR = "HYDRA_FULL_ERROR"
"""Environment variable that makes Hydra raise its errors; set only in this process and only during a sweep."""

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LauncherConfig:
    """`hydra/launcher=ddm_ray`: many runs in parallel under shared resources."""

    parallel: Annotated[int, Field(ge=1)] | None = None
    """Parallel trials; empty means one per shared CPU."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptunaConfig:
    """`hydra/sweeper=ddm_optuna`: Optuna chooses the values of each trial."""

    n_trials: Annotated[int, Field(ge=1)] = 20
    """Total number of trials, including those of earlier calls of the same sweep."""
    n_jobs: Annotated[int, Field(ge=1)] | None = None
    """Parallel trials; empty means `hydra.launcher.parallel`."""
    direction: Literal["minimize", "maximize"] = "minimize"
    """Whether smaller or larger values of the metric are better."""
    metric: str = ""
    """A number of the scores, such as `sticky.pixels.fd`; empty means the FD of the run's own selection."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the sampler; the values of trial n depend on it, on n, and on the scores so far."""
    startup: Annotated[int, Field(ge=0)] = 10
    """Random trials before the Parzen estimator (TPE) chooses."""
    params: dict[str, str] = Field(default_factory=dict)
    """Swept values from a YAML file instead of the command line."""


def parse_settings(kind: type[Settings], values: Mapping[str, Any], prefix: str) -> Settings:
    """Parse the settings at the key `prefix`; raises `ConfigError` with every mistake."""
    try:
        return TypeAdapter(kind).validate_python({key: values[key] for key in values if key != "_target_"})
    except ValidationError as error:
        mistakes = [
            f"{'.'.join([prefix, *map(str, mistake['loc'])])}: {mistake['msg']} (got {mistake['input']!r})"
            for mistake in error.errors()
        ]
        raise ConfigError("\n  ".join(mistakes)) from None
