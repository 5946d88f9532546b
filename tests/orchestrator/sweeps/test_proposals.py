"""Between Optuna and the runs: equal values are one run, and what has no score stays open."""

from functools import partial

import pytest

from orchestrator.sweeps.config import OptunaConfig
from orchestrator.sweeps.proposals import Proposals
from orchestrator.sweeps.search_space import Axis
from orchestrator.sweeps.study import Study
from orchestrator.sweeps.trial import TrialEnd
from tests.orchestrator.sweeps.fake_sweep import METRIC, trial_in


@pytest.fixture
def proposals_of(tmp_path):
    def trial_of(proposal):
        return trial_in(tmp_path, proposal.number, proposal.parameters)

    def made(choices: str, n_trials: int) -> Proposals:
        axis = Axis(key="partition.num_experts", choices=tuple(choices))
        study = Study(tmp_path / "optuna.jsonl", [axis], OptunaConfig(), is_parallel=True)
        return Proposals(study, trial_of, n_trials, METRIC)

    return made


def end(trial, score=1.0, state="finished") -> TrialEnd:
    return TrialEnd(trial=trial, state=state, score=score)


def test_equal_values_at_once_are_one_run(proposals_of):
    proposals = proposals_of("1", 3)
    trial = proposals.next_trial()
    assert trial is not None and proposals.next_trial() is None
    proposals.ended(end(trial))
    assert [(each.trial.number, each.score) for each in proposals.every_end()] == [(0, 1.0), (1, 1.0), (2, 1.0)]
    assert proposals.unstarted == 0 and not proposals.study.open()


@pytest.mark.parametrize(
    "without", [partial(end, state="failed"), partial(end, state="stopped"), partial(end, score=None)]
)
def test_without_a_score_a_trial_stays_open_for_the_next_call(proposals_of, without):
    proposals = proposals_of("1", 1)
    trial = proposals.next_trial()
    proposals.ended(without(trial))
    assert proposals.ends[0].state in ("failed", "stopped") and proposals.next_trial() is None

    again = proposals_of("1", 1)
    assert again.unstarted == 1 and again.next_trial() == trial and again.next_trial() is None
    again.ended(end(trial))
    assert proposals_of("1", 1).next_trial() is None
