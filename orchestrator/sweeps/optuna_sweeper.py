"""Hydra's sweeper `ddm_optuna`: Optuna chooses the values of every trial from the scores of earlier trials.

A trial that was running when the sweep was killed continues with its values and its number. The next call retries a
failed trial. A trial with a score never runs again.
"""

import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from orchestrator.errors import ConfigError
from orchestrator.planning.checks.check import check_run
from orchestrator.run.run_folder import RunFolder
from orchestrator.sweeps.config import OptunaConfig, parse_settings
from orchestrator.sweeps.display import SweepDisplay
from orchestrator.sweeps.launcher import HYDRA_MODULE, TrialLauncher
from orchestrator.sweeps.loop import lock_sweep_folder, raise_if_incomplete, run_trials
from orchestrator.sweeps.scores import check_metric, default_metric
from orchestrator.sweeps.search_space import Axis, Proposal
from orchestrator.sweeps.summary import show_summary
from orchestrator.sweeps.trial import SweepTrial, label_trial

if TYPE_CHECKING:
    from orchestrator.sweeps.proposals import Proposals


class OptunaSweeper(Sweeper):
    """Gets values from Optuna and reports scores to it."""

    __module__ = HYDRA_MODULE

    def __init__(
        self,
        n_trials: object,
        n_jobs: object,
        direction: object,
        metric: object,
        seed: object,
        startup: object,
        params: object,
    ) -> None:
        """Accept the values of Hydra's group; `setup` receives and checks the complete configuration."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store what Hydra has composed, and create the launcher that runs the trials."""
        self.config_loader = hydra_context.config_loader
        self.settings = parse_settings(OptunaConfig, config.hydra.sweeper, "hydra.sweeper")
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        if not isinstance(launcher, TrialLauncher):
            raise ConfigError(
                "hydra/sweeper=ddm_optuna runs its trials with hydra/launcher=ddm_ray; remove the other launcher"
            )
        self.launcher: TrialLauncher = launcher

    def sweep(self, arguments: list[str]) -> Any:
        """Run trials until there are `n_trials`; raises `RunFailed` or `SweepStopped` if some have no score."""
        axes, fixed = self._parse_space(arguments)
        metric = self._checked_metric(axes, fixed)
        launcher, folder = self.launcher, self.launcher.folder
        with lock_sweep_folder(folder):
            proposals = self._open_proposals(axes, fixed, metric, is_parallel=self.settings.n_jobs != 1)
            display = SweepDisplay(launcher.console, self.settings.n_trials, metric)
            with launcher.open_pool(metric, self.settings.n_jobs) as pool, display.show_live(pool.running):
                run_trials(pool, proposals.next_trial, proposals.record_end, display)
            maximize = self.settings.direction == "maximize"
            show_summary(launcher.console, folder, proposals.all_ends(), metric, maximize=maximize)
        raise_if_incomplete(proposals.ends, unstarted=proposals.unstarted)

    def _parse_space(self, arguments: list[str]) -> tuple[list[Axis], list[str]]:
        """Return the swept axes, and the overrides that all trials share."""
        parser = OverridesParser.create(config_loader=self.config_loader)
        params = [f"{key}={value}" for key, value in self.settings.params.items()]
        overrides = parser.parse_overrides([*params, *arguments])
        axes = [_parse_axis(override) for override in overrides if override.is_sweep_override()]
        if not axes:
            raise ConfigError(
                "hydra/sweeper=ddm_optuna has nothing to choose; sweep a key, such as partition.num_experts=2,4 or "
                "'expert.training.lr=tag(log,interval(1e-4,1e-2))'"
            )
        return axes, [str(override.input_line) for override in overrides if not override.is_sweep_override()]

    def _checked_metric(self, axes: Sequence[Axis], fixed: Sequence[str]) -> str:
        """Return the metric after checking it, data and machine at one point of the space; raises `ConfigError`."""
        parameters = {axis.key: axis.choices[0] if axis.choices else axis.format_value(axis.low) for axis in axes}
        overrides = [*fixed, *(f"{key}={value}" for key, value in parameters.items())]
        config = self.launcher.compose_trial(overrides, label_trial(parameters))
        check_metric(self.settings.metric or default_metric(config), config)
        check_run(config, RunFolder(Path(config.folder).expanduser()))
        return self.settings.metric or default_metric(config)

    def _open_proposals(
        self, axes: Sequence[Axis], fixed: Sequence[str], metric: str, *, is_parallel: bool
    ) -> "Proposals":
        """Open the sweep's study; raises `ConfigError` without Optuna, or if the study is of another sweep."""
        if importlib.util.find_spec("optuna") is None:
            raise ConfigError(
                "hydra/sweeper=ddm_optuna needs Optuna; install it with pip install 'decentralized-diffusion[sweeps]'"
            )
        from orchestrator.sweeps.proposals import Proposals
        from orchestrator.sweeps.study import Study  # Optuna is imported only by sweeps that use it

        study = Study(self.launcher.folder / "optuna.jsonl", axes, self.settings, is_parallel=is_parallel)
        study.check_comparable(_score_overrides(fixed), metric)
        return Proposals(study, partial(self._build_trial, fixed), self.settings.n_trials, metric)

    def _build_trial(self, fixed: Sequence[str], proposal: Proposal) -> SweepTrial:
        overrides = [*fixed, *(f"{key}={value}" for key, value in proposal.parameters.items())]
        return self.launcher.build_trial(proposal.number, overrides, proposal.parameters)


def _parse_axis(override: Override) -> Axis:
    """Convert a swept override: a list becomes choices, a range its numbers, an interval all numbers between."""
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep) and value.start is not None and value.end is not None:
        is_integer = isinstance(value.start, int) and isinstance(value.end, int)
        return Axis(key=key, low=value.start, high=value.end, is_log="log" in value.tags, is_integer=is_integer)
    if isinstance(value, RangeSweep):
        numbers = sorted(value.range())
        is_integer = all(isinstance(number, int) for number in numbers)
        if not numbers or "log" in value.tags:
            raise ConfigError(f"{override.input_line}: a range needs at least one number, and `log` an interval")
        return Axis(key=key, low=numbers[0], high=numbers[-1], step=abs(float(value.step)), is_integer=is_integer)
    return Axis(key=key, choices=tuple(dict.fromkeys(override.sweep_string_iterator())))


def _score_overrides(fixed: Sequence[str]) -> list[str]:
    """Return the overrides that a score depends on, without placement and tracking."""
    return [text for text in fixed if not text.startswith(("compute=", "compute.", "wandb.", "hydra"))]
