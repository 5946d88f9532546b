"""Hydra's launcher `ddm_ray`: the trials of a sweep at once, under one budget.

It also is what our own sweeper asks for trials.
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
from orchestrator.sweeps.config import LauncherConfig, settings
from orchestrator.sweeps.display import SweepDisplay
from orchestrator.sweeps.loop import finish_sweep, only_sweep, run_trials
from orchestrator.sweeps.resources import shared_budget
from orchestrator.sweeps.scores import default_metric
from orchestrator.sweeps.summary import show_summary
from orchestrator.sweeps.trial import SweepTrial, TrialEnd, swept_parameters, trial_config, trial_label
from orchestrator.sweeps.trial_pool import TrialPool

PACKAGE, NAME = "hydra_plugins", "ddm"

HYDRA_MODULE = f"{PACKAGE}.{NAME}"
"""The module that a plugin of ours says it is from: its class attribute `__module__`."""


def register(kind: type[Plugin], choice: str, defaults: object) -> None:
    """Let Hydra know a choice such as `hydra/launcher=ddm_ray`, with the fields of `defaults` as its keys."""
    group, _, name = choice.partition("=")
    Plugins.instance().register(kind)
    setattr(_module(), kind.__name__, kind)
    node = {"_target_": f"{HYDRA_MODULE}.{kind.__name__}", **to_jsonable(defaults)}
    ConfigStore.instance().store(name, node, group=group, provider=NAME)


def _module() -> ModuleType:
    """The module `hydra_plugins.ddm`, beside whatever other plugins are installed."""
    if HYDRA_MODULE not in sys.modules:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(PACKAGE)
        package = sys.modules.setdefault(PACKAGE, ModuleType(PACKAGE))
        module = sys.modules[HYDRA_MODULE] = ModuleType(HYDRA_MODULE)
        setattr(package, NAME, module)
    return sys.modules[HYDRA_MODULE]


class TrialLauncher(Launcher):
    """Runs trials at once, each as a process of its own."""

    __module__ = HYDRA_MODULE

    def __init__(self, parallel: object) -> None:
        """Hydra gives the values of its group here, and the whole configuration to `setup`, which checks them."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra has composed; the task function is for launchers that run trials in this process."""
        self.context, self.master = hydra_context, config
        self.settings = settings(LauncherConfig, config.hydra.launcher, "hydra.launcher")
        self.folder = Path(str(config.hydra.sweep.dir)).expanduser()
        self.console = Console()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run every trial of a grid; raises `RunFailed` or `SweepStopped` once all have ended."""
        hydra = self.master.hydra
        swept = swept_keys(hydra.overrides.task) | set(hydra.sweeper.get("params") or ())
        every = [
            self.trial(number, overrides, swept_parameters(overrides, swept))
            for number, overrides in enumerate(job_overrides, start=initial_job_idx)
        ]
        trials = list({trial.label: trial for trial in reversed(every)}.values())[::-1]  # equal values are one run
        config = next((trial.config for trial in trials if trial.config), None)
        metric = "" if config is None else default_metric(config)
        ends: list[TrialEnd] = []
        with only_sweep(self.folder):
            self._walk(trials, ends, metric)
            show_summary(self.console, self.folder, ends, metric, maximize=False)
        finish_sweep(ends, unstarted=len(trials) - len(ends))
        return [JobReturn(overrides=overrides, status=JobStatus.COMPLETED) for overrides in job_overrides]

    def _walk(self, trials: Sequence[SweepTrial], ends: list[TrialEnd], metric: str) -> None:
        display = SweepDisplay(self.console, len(trials), metric)
        following = iter(trials)
        with self.pool("") as pool, display.showing(pool.members):
            run_trials(pool, lambda: next(following, None), ends.append, display)

    def trial(self, number: int, overrides: Sequence[str], parameters: Mapping[str, str]) -> SweepTrial:
        """A trial from its overrides; what Hydra or the configuration refuses becomes its error."""
        label = trial_label(parameters)
        try:
            config, error = self.config(overrides, label), ""
        except ConfigError as refused:
            config, error = None, str(refused)
        return SweepTrial(number=number, label=label, config=config, parameters=dict(parameters), error=error)

    def config(self, overrides: Sequence[str], label: str) -> RunConfig:
        """The configuration of a trial; raises `ConfigError`."""
        try:
            composed = self.context.config_loader.load_sweep_config(self.master, list(overrides))
            with open_dict(composed):
                del composed["hydra"]
            return trial_config(to_dictionary(composed), label)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(str(error).splitlines()[0]) from None

    @contextmanager
    def pool(self, metric: str, at_once: int | None = None) -> Iterator[TrialPool]:
        """A pool of trials under one budget, `at_once` of them if that is less than the launcher allows."""
        with shared_budget(self._compute()) as budget:

            def limit() -> int:
                allowed = self.settings.parallel or budget.cpus
                return min(allowed, at_once or allowed)

            yield TrialPool(limit, lambda: budget.environment, metric)

    def _compute(self) -> ComputeConfig:
        """Where all trials run; what is swept below `compute` is not seen here."""
        composed: Any = OmegaConf.to_container(self.master.compute, resolve=True)
        return TypeAdapter(ComputeConfig).validate_python(composed)
