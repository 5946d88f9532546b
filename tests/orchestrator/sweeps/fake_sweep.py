"""A sweep of fake trials in a separate process, which tests can kill.

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
from orchestrator.sweeps.loop import lock_sweep_folder, raise_if_incomplete, run_trials
from orchestrator.sweeps.proposals import Proposals
from orchestrator.sweeps.search_space import Axis, Proposal
from orchestrator.sweeps.study import Study
from orchestrator.sweeps.summary import show_summary
from orchestrator.sweeps.trial import SweepTrial, label_trial
from orchestrator.sweeps.trial_pool import TrialPool

METRIC = "sticky.pixels.fd"
AXES = [
    Axis(key="expert.training.lr", low=1e-4, high=1e-2, is_log=True),
    Axis(key="partition.num_experts", choices=("1", "2")),
]


def fake_trial_command(trial: SweepTrial) -> list[str]:
    """Return the command of a trial's fake controller."""
    return [sys.executable, "-m", "tests.orchestrator.sweeps.fake_trial", str(trial.run.root)]


def build_fake_trial(folder: Path, number: int, parameters: dict[str, str], seed: int = 0) -> SweepTrial:
    """Return a trial of a small run."""
    default = RunConfig()
    label = label_trial(parameters)
    config = replace(
        default,
        folder=str(folder / label),
        seed=seed,
        monolith=False,
        partition=replace(default.partition, num_experts=int(parameters.get("partition.num_experts", "1"))),
        expert=replace(
            default.expert,
            training=replace(default.expert.training, lr=float(parameters.get("expert.training.lr", "0.001"))),
        ),
    )
    return SweepTrial(number=number, label=label, config=config, parameters=parameters)


def run_fake_sweep(folder: Path, n_trials: int, parallel: int) -> None:
    """Run the sweep; raises what `raise_if_incomplete` raises."""

    def build_trial(proposal: Proposal) -> SweepTrial:
        return build_fake_trial(folder, proposal.number, proposal.parameters)

    console = Console()
    with lock_sweep_folder(folder / "sweep"):
        config = OptunaConfig(startup=2)
        study = Study(folder / "sweep" / "optuna.jsonl", AXES, config, is_parallel=parallel > 1)
        proposals = Proposals(study, build_trial, n_trials, METRIC)
        pool = TrialPool(lambda: parallel, lambda: os.environ, METRIC, fake_trial_command)
        run_trials(pool, proposals.next_trial, proposals.record_end, SweepDisplay(console, n_trials, METRIC))
        show_summary(console, folder / "sweep", proposals.all_ends(), METRIC, maximize=False)
    raise_if_incomplete(proposals.ends, unstarted=proposals.unstarted)


if __name__ == "__main__":
    run_fake_sweep(Path(sys.argv[1]), int(sys.argv[2]), int((sys.argv[3:] or ["1"])[0]))
