"""Hydra's launcher `ddm_ray`: the trials of a sweep in parallel under shared resources.

Our own sweeper builds and runs its trials with it, too.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.plugin import Plugin
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter
from rich.console import Console

from ddm_core.artifacts import to_jsonable
from orchestrator.config.compute import ComputeConfig
from orchestrator.config.hydra_compose import swept_keys, to_dictionary
from orchestrator.config.schema import RunConfig
from orchestrator.errors import ConfigError
from orchestrator.planning.checks.check import check_run
from orchestrator.run.run_folder import RunFolder
from orchestrator.sweeps.config import LauncherConfig, parse_settings
from orchestrator.sweeps.display import SweepDisplay
from orchestrator.sweeps.loop import lock_sweep_folder, raise_if_incomplete, run_trials
from orchestrator.sweeps.resources import open_shared_resources
from orchestrator.sweeps.scores import default_metric
from orchestrator.sweeps.summary import show_summary
from orchestrator.sweeps.trial import SweepTrial, TrialEnd, label_trial, parse_trial_config, swept_parameters
from orchestrator.sweeps.trial_pool import TrialPool

PACKAGE, NAME = "hydra_plugins", "ddm"

HYDRA_MODULE = f"{PACKAGE}.{NAME}"
"""Module name of our plugins, set as their class attribute `__module__`; Hydra reads it."""


def register_plugin(kind: type[Plugin], choice: str, defaults: object) -> None:
    """Register a choice such as `hydra/launcher=ddm_ray`, with the fields of `defaults` as its keys."""
    group, _, name = choice.partition("=")
    Plugins.instance().register(kind)
    setattr(_plugin_module(), kind.__name__, kind)
    node = {"_target_": f"{HYDRA_MODULE}.{kind.__name__}", **to_jsonable(defaults)}
    ConfigStore.instance().store(name, node, group=group, provider=NAME)


def _plugin_module() -> ModuleType:
    """Return the module `hydra_plugins.ddm`, created next to any other installed plugins."""
    if HYDRA_MODULE not in sys.modules:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(PACKAGE)
        package = sys.modules.setdefault(PACKAGE, ModuleType(PACKAGE))
        module = sys.modules[HYDRA_MODULE] = ModuleType(HYDRA_MODULE)
        setattr(package, NAME, module)
    return sys.modules[HYDRA_MODULE]


class TrialLauncher(Launcher):
    """Runs trials in parallel, each in a separate process."""

    __module__ = HYDRA_MODULE

    def __init__(self, parallel: object) -> None:
        """Accept the values of Hydra's group; `setup` receives and checks the complete configuration."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store what Hydra has composed; the task function serves launchers that run trials in this process."""
        self.context, self.master = hydra_context, config
        self.settings = parse_settings(LauncherConfig, config.hydra.launcher, "hydra.launcher")
        self.folder = Path(str(config.hydra.sweep.dir)).expanduser()
        self.console = Console()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run every trial of a grid; raises `RunFailed` or `SweepStopped` after all have ended.

        Trials that cannot succeed end first. Raises `ConfigError` before anything starts if none can, for one reason.
        """
        hydra = self.master.hydra
        swept = swept_keys(hydra.overrides.task) | set(hydra.sweeper.get("params") or ())
        all_trials = [
            self.build_trial(number, overrides, swept_parameters(overrides, swept))
            for number, overrides in enumerate(job_overrides, start=initial_job_idx)
        ]
        trials = list({trial.label: trial for trial in reversed(all_trials)}.values())[::-1]  # equal values share a run
        trials.sort(key=lambda trial: not trial.error)
        if trials[0].error and len({trial.error for trial in trials}) == 1:
            raise ConfigError(trials[0].error)
        config = next((trial.config for trial in trials if trial.config), None)
        metric = "" if config is None else default_metric(config)
        ends: list[TrialEnd] = []
        with lock_sweep_folder(self.folder):
            self._run_trials(trials, ends, metric)
            show_summary(self.console, self.folder, ends, metric, maximize=False)
        raise_if_incomplete(ends, unstarted=len(trials) - len(ends))
        return [JobReturn(overrides=overrides, status=JobStatus.COMPLETED) for overrides in job_overrides]

    def _run_trials(self, trials: Sequence[SweepTrial], ends: list[TrialEnd], metric: str) -> None:
        display = SweepDisplay(self.console, len(trials), metric)
        remaining = iter(trials)
        with self.open_pool("") as pool, display.show_live(pool.running):
            run_trials(pool, lambda: next(remaining, None), ends.append, display)

    def build_trial(self, number: int, overrides: Sequence[str], parameters: Mapping[str, str]) -> SweepTrial:
        """Build a trial from its overrides; an invalid configuration, or one that cannot succeed, becomes its error."""
        label = label_trial(parameters)
        try:
            config, error = self.compose_trial(overrides, label), ""
            check_run(config, RunFolder(Path(config.folder).expanduser()))
        except ConfigError as mistake:
            config, error = None, str(mistake)
        return SweepTrial(number=number, label=label, config=config, parameters=dict(parameters), error=error)

    def compose_trial(self, overrides: Sequence[str], label: str) -> RunConfig:
        """Compose the configuration of a trial; raises `ConfigError`."""
        try:
            composed = self.context.config_loader.load_sweep_config(self.master, list(overrides))
            with open_dict(composed):
                del composed["hydra"]
            return parse_trial_config(to_dictionary(composed), label)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(str(error).splitlines()[0]) from None

    @contextmanager
    def open_pool(self, metric: str, max_parallel: int | None = None) -> Iterator[TrialPool]:
        """Open a pool of trials with shared resources; at most `max_parallel` run in parallel."""
        with open_shared_resources(self._compute_config()) as resources:

            def limit() -> int:
                parallel = self.settings.parallel or resources.cpus
                return min(parallel, max_parallel or parallel)

            yield TrialPool(limit, lambda: resources.environment, metric)

    def _compute_config(self) -> ComputeConfig:
        """Return where all trials run; swept keys below `compute` are ignored."""
        composed: Any = OmegaConf.to_container(self.master.compute, resolve=True)
        return TypeAdapter(ComputeConfig).validate_python(composed)
