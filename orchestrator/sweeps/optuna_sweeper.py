"""Hydra's sweeper `ddm_optuna`: Optuna chooses the values of every trial, from the scores of those before.

A trial that was running when the sweep was killed is taken up again with its values and its number; one that failed is
tried again by the next call; one that has a score is never run again.
"""

import importlib.util
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from orchestrator.errors import ConfigError
from orchestrator.sweeps.config import OptunaConfig, settings
from orchestrator.sweeps.display import SweepDisplay
from orchestrator.sweeps.launcher import HYDRA_MODULE, TrialLauncher
from orchestrator.sweeps.loop import finish_sweep, only_sweep, run_trials
from orchestrator.sweeps.scores import default_metric, refuse_unknown_rows
from orchestrator.sweeps.search_space import Axis, Proposal
from orchestrator.sweeps.summary import show_summary
from orchestrator.sweeps.trial import SweepTrial, trial_label

if TYPE_CHECKING:
    from orchestrator.sweeps.proposals import Proposals


class OptunaSweeper(Sweeper):
    """Asks Optuna for values, and tells it the scores."""

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
        """Hydra gives the values of its group here, and the whole configuration to `setup`, which checks them."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra has composed, and the launcher that runs the trials."""
        self.config_loader = hydra_context.config_loader
        self.settings = settings(OptunaConfig, config.hydra.sweeper, "hydra.sweeper")
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        if not isinstance(launcher, TrialLauncher):
            raise ConfigError(
                "hydra/sweeper=ddm_optuna runs its trials with hydra/launcher=ddm_ray; leave out the other"
            )
        self.launcher: TrialLauncher = launcher

    def sweep(self, arguments: list[str]) -> Any:
        """Run trials until there are `n_trials`; raises `RunFailed` or `SweepStopped` if some have no score."""
        axes, fixed = self._space(arguments)
        metric = self._checked_metric(axes, fixed)
        launcher, folder = self.launcher, self.launcher.folder
        with only_sweep(folder):
            proposals = self._proposals(axes, fixed, metric, is_parallel=self.settings.n_jobs != 1)
            display = SweepDisplay(launcher.console, self.settings.n_trials, metric)
            with launcher.pool(metric, self.settings.n_jobs) as pool, display.showing(pool.members):
                run_trials(pool, proposals.next_trial, proposals.ended, display)
            maximize = self.settings.direction == "maximize"
            show_summary(launcher.console, folder, proposals.every_end(), metric, maximize=maximize)
        finish_sweep(proposals.ends, unstarted=proposals.unstarted)

    def _space(self, arguments: list[str]) -> tuple[list[Axis], list[str]]:
        """What is swept, and the overrides that all trials share."""
        parser = OverridesParser.create(config_loader=self.config_loader)
        given = [*(f"{key}={value}" for key, value in self.settings.params.items()), *arguments]
        overrides = parser.parse_overrides(given)
        axes = [_axis(override) for override in overrides if override.is_sweep_override()]
        if not axes:
            raise ConfigError(
                "hydra/sweeper=ddm_optuna has nothing to choose: sweep a key, such as partition.num_experts=2,4 or "
                "'expert.training.lr=tag(log,interval(1e-4,1e-2))'"
            )
        return axes, [str(override.input_line) for override in overrides if not override.is_sweep_override()]

    def _checked_metric(self, axes: Sequence[Axis], fixed: Sequence[str]) -> str:
        """The metric, once one corner of the space has shown that runs have it; raises `ConfigError`."""
        parameters = {axis.key: axis.choices[0] if axis.choices else axis.text(axis.low) for axis in axes}
        overrides = [*fixed, *(f"{key}={value}" for key, value in parameters.items())]
        config = self.launcher.config(overrides, trial_label(parameters))
        refuse_unknown_rows(self.settings.metric or default_metric(config), config)
        return self.settings.metric or default_metric(config)

    def _proposals(self, axes: Sequence[Axis], fixed: Sequence[str], metric: str, *, is_parallel: bool) -> "Proposals":
        """What Optuna knows of this sweep; raises `ConfigError` if it is not installed or knows another one."""
        if importlib.util.find_spec("optuna") is None:
            raise ConfigError(
                "hydra/sweeper=ddm_optuna needs Optuna; install it with pip install 'decentralized-diffusion[sweeps]'"
            )
        from orchestrator.sweeps.proposals import Proposals
        from orchestrator.sweeps.study import Study  # Optuna is imported only by a sweep that wants it

        study = Study(self.launcher.folder / "optuna.jsonl", axes, self.settings, is_parallel=is_parallel)
        study.refuse_other_meaning(_meaning(fixed), metric)
        return Proposals(study, partial(self._trial, fixed), self.settings.n_trials, metric)

    def _trial(self, fixed: Sequence[str], proposal: Proposal) -> SweepTrial:
        overrides = [*fixed, *(f"{key}={value}" for key, value in proposal.parameters.items())]
        return self.launcher.trial(proposal.number, overrides, proposal.parameters)


def _axis(override: Override) -> Axis:
    """A swept override as an axis: what is listed is a choice, a range is its numbers, an interval all between."""
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep) and value.start is not None and value.end is not None:
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        return Axis(key=key, low=value.start, high=value.end, is_log="log" in value.tags, is_whole=whole)
    if isinstance(value, RangeSweep):
        numbers = sorted(value.range())
        whole = all(isinstance(number, int) for number in numbers)
        if not numbers or "log" in value.tags:
            raise ConfigError(f"{override.input_line}: a range needs at least one number, and `log` an interval")
        return Axis(key=key, low=numbers[0], high=numbers[-1], step=abs(float(value.step)), is_whole=whole)
    return Axis(key=key, choices=tuple(dict.fromkeys(override.sweep_string_iterator())))


def _meaning(fixed: Sequence[str]) -> list[str]:
    """The overrides that a score depends on: not where it is computed, or what is told to wandb."""
    return [text for text in fixed if not text.startswith(("compute=", "compute.", "wandb.", "hydra"))]
