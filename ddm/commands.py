"""The commands of `ddm` as functions: configurations are Hydra overrides, as on the command line."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ddm.runs import Run
from orchestrator.cli.replacement import check_replacement
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import RunConfig, parse_config
from orchestrator.controller import run_pipeline
from orchestrator.errors import RunFailed
from orchestrator.reporting.tables.ranking import ScoreRow
from orchestrator.run.run_folder import RunFolder

if TYPE_CHECKING:
    from ddm.pipeline import DDMPipeline
    from orchestrator.cli.submit import Submission
    from orchestrator.planning.plan import Plan

__all__ = ["compress", "evaluate", "load_config", "plan", "run", "submit"]


def load_config(*overrides: str) -> RunConfig:
    """Compose the configuration of overrides such as `"experiment=demo"`; raises `ConfigError` for a wrong one."""
    return parse_config(compose(list(overrides)))


def run(*overrides: str, replace: bool = False, console: Console | None = None) -> Run:
    """Run the whole pipeline, or continue an earlier run in the same folder, and write its report.

    `folder=…` among the overrides names the run folder; the default is `runs/<name>`. Progress is printed to `console`.
    A folder that holds a finished run with other settings is refused; `replace` archives those settings. Raises
    `ConfigError` for a wrong override and `RunFailed` if a stage that is needed fails or the run is stopped.
    """
    config = load_config(*overrides)
    check_replacement(RunFolder(Path(config.folder).expanduser()), config, replace=replace)
    return _execute(config, console)


def plan(*overrides: str) -> Plan:
    """Plan a run without running anything: stages, places, FLOPs, times and prices as far as they are known."""
    from orchestrator.planning.plan import plan_run

    config = load_config(*overrides)
    return plan_run(config, RunFolder(Path(config.folder).expanduser()))


def submit(*overrides: str, address: str, token_file: str | os.PathLike[str]) -> Submission:
    """Submit the controller of a run as a job to the Ray cluster at `address`, and return at once.

    `token_file` holds the cluster's token (mode 600). The cluster must see the run folder under the same path.
    """
    from orchestrator.cli.submit import resolve_submission, submit_run

    return submit_run(*resolve_submission(load_config(*overrides), address, str(token_file)))


def evaluate(path: str | os.PathLike[str], selection: str, console: Console | None = None) -> list[ScoreRow]:
    """Score a finished run with one more selection, and return its table of scores."""
    from orchestrator.cli.sample import with_selection

    return _execute(with_selection(Run(path).folder, selection), console).scores()


def compress(path: str | os.PathLike[str], *overrides: str, console: Console | None = None) -> DDMPipeline:
    """Add compression stages such as `"quantize=int8_dynamic"` to a finished run, and load the compressed ensemble.

    The original ensemble stays. Raises `ConfigError` for stages that do not fit together, and `UntrustedFolder` for a
    run whose settings another user wrote: look at it with `ddm resume`, which can trust it.
    """
    from orchestrator.cli.compress import with_compression
    from orchestrator.config.stage_kinds import COMPRESSION_KINDS
    from orchestrator.reporting.results import find_pipeline
    from orchestrator.run.trust import require_trust

    finished = Run(path)
    find_pipeline(finished.folder, monolith=False)
    require_trust(finished.folder, finished.config, trust=False)
    config = with_compression(finished.config, overrides)
    compressed = _execute(replace(config, folder=str(finished.folder.root)), console)
    last = [stage.name for stage in compressed.graph if stage.kind in COMPRESSION_KINDS][-1]
    return compressed.pipeline(last)


def _execute(config: RunConfig, console: Console | None) -> Run:
    result = run_pipeline(config, console or Console())
    folder = Path(config.folder).expanduser()
    if result.stopped:
        raise RunFailed(f"the run in {folder} was stopped; the same call continues it")
    finished = Run(folder)
    if result.submitted or not finished.folder.report.exists():
        finished.report()
    return finished
