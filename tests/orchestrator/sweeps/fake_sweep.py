"""A sweep of fake trials in a process of its own, which can be killed.

`python -m tests.orchestrator.sweeps.fake_sweep FOLDER N [PARALLEL]` lets Optuna choose N learning rates.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from orchestrator.config.schema import RunConfig
from orchestrator.sweeps.config import OptunaConfig
from orchestrator.sweeps.display import SweepDisplay
from orchestrator.sweeps.loop import finish_sweep, only_sweep, run_trials
from orchestrator.sweeps.proposals import Proposals
from orchestrator.sweeps.search_space import Axis, Proposal
from orchestrator.sweeps.study import Study
from orchestrator.sweeps.summary import show_summary
from orchestrator.sweeps.trial import SweepTrial, trial_label
from orchestrator.sweeps.trial_pool import TrialPool

METRIC = "sticky.pixels.fd"
AXES = [
    Axis(key="expert.training.lr", low=1e-4, high=1e-2, is_log=True),
    Axis(key="partition.num_experts", choices=("1", "2")),
]


def command(trial: SweepTrial) -> list[str]:
    """The fake controller of a trial."""
    return [sys.executable, "-m", "tests.orchestrator.sweeps.fake_trial", str(trial.run.root)]


def trial_in(folder: Path, number: int, parameters: dict[str, str], seed: int = 0) -> SweepTrial:
    """A trial of a small run."""
    plain = RunConfig()
    label = trial_label(parameters)
    config = replace(
        plain,
        folder=str(folder / label),
        seed=seed,
        monolith=False,
        partition=replace(plain.partition, num_experts=int(parameters.get("partition.num_experts", "1"))),
        expert=replace(
            plain.expert,
            training=replace(plain.expert.training, lr=float(parameters.get("expert.training.lr", "0.001"))),
        ),
    )
    return SweepTrial(number=number, label=label, config=config, parameters=parameters)


def sweep(folder: Path, n_trials: int, parallel: int) -> None:
    """Run it; raises what `conclude` raises."""

    def trial_of(proposal: Proposal) -> SweepTrial:
        return trial_in(folder, proposal.number, proposal.parameters)

    console = Console()
    with only_sweep(folder / "sweep"):
        config = OptunaConfig(startup=2)
        study = Study(folder / "sweep" / "optuna.jsonl", AXES, config, is_parallel=parallel > 1)
        proposals = Proposals(study, trial_of, n_trials, METRIC)
        pool = TrialPool(lambda: parallel, lambda: os.environ, METRIC, command)
        run_trials(pool, proposals.next_trial, proposals.ended, SweepDisplay(console, n_trials, METRIC))
        show_summary(console, folder / "sweep", proposals.every_end(), METRIC, maximize=False)
    finish_sweep(proposals.ends, unstarted=proposals.unstarted)


if __name__ == "__main__":
    sweep(Path(sys.argv[1]), int(sys.argv[2]), int((sys.argv[3:] or ["1"])[0]))
