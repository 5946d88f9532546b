"""Map Optuna's proposals to trials: each proposal is one trial, and proposals with equal values share one run."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from orchestrator.sweeps.search_space import Proposal
from orchestrator.sweeps.study import Study
from orchestrator.sweeps.trial import SweepTrial, TrialEnd


@dataclass
class Proposals:
    """Provides trials, first those that an earlier call left open, and records their scores in the study."""

    study: Study
    build_trial: Callable[[Proposal], SweepTrial]
    n_trials: int
    metric: str
    ends: list[TrialEnd] = field(default_factory=list)
    """Ends of this call's trials."""
    _open: list[Proposal] = field(init=False)
    _running: dict[str, list[SweepTrial]] = field(default_factory=dict)
    """By label; one run may be the trial of several proposals."""

    def __post_init__(self) -> None:
        """Load the proposals that earlier calls left open."""
        self._open = self.study.open_proposals()

    @property
    def unproposed(self) -> int:
        """Return the number of trials that are not yet proposed."""
        return max(0, self.n_trials - self.study.total)

    @property
    def unstarted(self) -> int:
        """Return the number of trials without a run in this call; positive only after a stopped sweep."""
        return self.unproposed + len(self._open)

    def next_trial(self) -> SweepTrial | None:
        """Return the next trial to run; None if there is none."""
        while self._open or self.unproposed:
            trial = self.build_trial(self._open.pop(0) if self._open else self.study.propose())
            equal_trials = self._running.setdefault(trial.label, [])
            equal_trials.append(trial)
            if len(equal_trials) == 1:
                return trial
        return None

    def record_end(self, end: TrialEnd) -> None:
        """Record how a run ended; without a score its proposals stay open for the next call."""
        if end.state == "finished" and end.score is None:
            end = replace(end, state="failed", error=f"its scores lack {self.metric}")
        for trial in self._running.pop(end.trial.label):
            if end.state == "finished" and end.score is not None:
                self.study.record(trial.number, end.score)
            self.ends.append(replace(end, trial=trial))

    def all_ends(self) -> list[TrialEnd]:
        """Return the ends of all trials of all calls."""
        current = {end.trial.number: end for end in self.ends}
        earlier = [
            self._earlier_end(proposal) for proposal in self.study.scored_proposals() if proposal.number not in current
        ]
        return [*earlier, *current.values()]

    def _earlier_end(self, proposal: Proposal) -> TrialEnd:
        return TrialEnd(trial=self.build_trial(proposal), state="finished", score=proposal.score)
