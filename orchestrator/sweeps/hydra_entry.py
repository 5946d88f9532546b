"""`ddm run -m`: Hydra's multirun composes every combination; a launcher of ours runs them, too."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from orchestrator.config.hydra_compose import (
    check_group_files,
    check_words,
    config_folder,
    explain_error,
    quote_override,
    register_defaults,
    swept_keys,
    to_dictionary,
)
from orchestrator.config.injection_guard import check_overrides
from orchestrator.errors import ConfigError
from orchestrator.sweeps.config import FULL_ERROR, LauncherConfig, OptunaConfig
from orchestrator.sweeps.launcher import TrialLauncher, register_plugin
from orchestrator.sweeps.optuna_sweeper import OptunaSweeper
from orchestrator.sweeps.trial import swept_parameters

OUR_LAUNCHER, OUR_SWEEPER = "hydra/launcher=ddm_ray", "hydra/sweeper=ddm_optuna"


def run_sweep(overrides: Sequence[str]) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """Pass all combinations to Hydra's sweeper and launcher.

    Our launcher runs the trials in parallel. With Hydra's own, nothing is run: returns the configuration and the swept
    values of each combination.
    """
    check_words(overrides)
    check_overrides(overrides)
    register_defaults()
    _register_plugins()
    try:
        arguments = _with_our_launcher([quote_override(text, is_sweep=True) for text in overrides])
        check_group_files(arguments)
    except HydraException as error:
        raise ConfigError(explain_error(str(error), overrides)) from None

    combinations = []

    def collect(composed: DictConfig) -> None:
        settings = HydraConfig.get()
        swept = swept_keys(arguments) | set(settings.sweeper.get("params") or ())
        combinations.append((to_dictionary(composed), swept_parameters(settings.overrides.task, swept)))

    sys.argv = ["ddm", "--multirun", *arguments]
    try:
        with _plain_errors():
            hydra.main(version_base="1.3", config_path=config_folder(), config_name="config")(collect)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain_error(str(error), overrides)) from None
    return combinations


def _with_our_launcher(arguments: list[str]) -> list[str]:
    """Add our launcher if our sweeper is chosen, which needs it."""
    has_launcher = any(text.startswith("hydra/launcher=") for text in arguments)
    return arguments if has_launcher or OUR_SWEEPER not in arguments else [*arguments, OUR_LAUNCHER]


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Let Hydra raise its errors instead of printing them with a traceback and exiting."""
    before = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FULL_ERROR]
        else:
            os.environ[FULL_ERROR] = before


def _register_plugins() -> None:
    register_plugin(TrialLauncher, OUR_LAUNCHER, LauncherConfig())
    register_plugin(OptunaSweeper, OUR_SWEEPER, OptunaConfig())
