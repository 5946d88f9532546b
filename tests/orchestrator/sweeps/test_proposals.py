"""From proposals to runs: equal values share one run, and proposals without a score stay open."""

from functools import partial

import pytest

from orchestrator.sweeps.config import OptunaConfig
from orchestrator.sweeps.proposals import Proposals
from orchestrator.sweeps.search_space import Axis
from orchestrator.sweeps.study import Study
from orchestrator.sweeps.trial import TrialEnd
from tests.orchestrator.sweeps.fake_sweep import METRIC, build_fake_trial


@pytest.fixture
def open_proposals(tmp_path):
    def build_trial(proposal):
        return build_fake_trial(tmp_path, proposal.number, proposal.parameters)

    def build(choices: str, n_trials: int) -> Proposals:
        axis = Axis(key="partition.num_experts", choices=tuple(choices))
        study = Study(tmp_path / "optuna.jsonl", [axis], OptunaConfig(), is_parallel=True)
        return Proposals(study, build_trial, n_trials, METRIC)

    return build


def end(trial, score=1.0, state="finished") -> TrialEnd:
    return TrialEnd(trial=trial, state=state, score=score)


def test_equal_proposals_share_one_run(open_proposals):
    proposals = open_proposals("1", 3)
    trial = proposals.next_trial()
    assert trial is not None and proposals.next_trial() is None
    proposals.record_end(end(trial))
    assert [(entry.trial.number, entry.score) for entry in proposals.all_ends()] == [(0, 1.0), (1, 1.0), (2, 1.0)]
    assert proposals.unstarted == 0 and not proposals.study.open_proposals()


@pytest.mark.parametrize(
    "end_without_score", [partial(end, state="failed"), partial(end, state="stopped"), partial(end, score=None)]
)
def test_trial_without_score_stays_open_for_next_call(open_proposals, end_without_score):
    proposals = open_proposals("1", 1)
    trial = proposals.next_trial()
    proposals.record_end(end_without_score(trial))
    assert proposals.ends[0].state in ("failed", "stopped") and proposals.next_trial() is None

    reopened = open_proposals("1", 1)
    assert reopened.unstarted == 1 and reopened.next_trial() == trial and reopened.next_trial() is None
    reopened.record_end(end(trial))
    assert open_proposals("1", 1).next_trial() is None
