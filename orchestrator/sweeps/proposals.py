"""Between Optuna's proposals and the trials that run: every proposal is one trial, equal values are one run."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from orchestrator.sweeps.search_space import Proposal
from orchestrator.sweeps.study import Study
from orchestrator.sweeps.trial import SweepTrial, TrialEnd


@dataclass
class Proposals:
    """Gives out trials, those that an earlier call left open first, and tells the study their scores."""

    study: Study
    trial_of: Callable[[Proposal], SweepTrial]
    n_trials: int
    metric: str
    ends: list[TrialEnd] = field(default_factory=list)
    """How the trials of this call ended."""
    _open: list[Proposal] = field(init=False)
    _at_work: dict[str, list[SweepTrial]] = field(default_factory=dict)
    """By label: one run may be the trial of several proposals."""

    def __post_init__(self) -> None:
        """Find what earlier calls have left open."""
        self._open = self.study.open()

    @property
    def unproposed(self) -> int:
        """Trials that are still to be proposed."""
        return max(0, self.n_trials - self.study.total)

    @property
    def unstarted(self) -> int:
        """Trials that no run was started for in this call: only a sweep that was stopped has any."""
        return self.unproposed + len(self._open)

    def next_trial(self) -> SweepTrial | None:
        """The next trial to run; None if there is none."""
        while self._open or self.unproposed:
            trial = self.trial_of(self._open.pop(0) if self._open else self.study.propose())
            same = self._at_work.setdefault(trial.label, [])
            same.append(trial)
            if len(same) == 1:
                return trial
        return None

    def ended(self, end: TrialEnd) -> None:
        """Tell the study how a run ended; without a score its proposals stay open, for the next call."""
        if end.state == "finished" and end.score is None:
            end = replace(end, state="failed", error=f"its scores have no {self.metric}")
        for trial in self._at_work.pop(end.trial.label):
            if end.state == "finished" and end.score is not None:
                self.study.record(trial.number, end.score)
            self.ends.append(replace(end, trial=trial))

    def every_end(self) -> list[TrialEnd]:
        """How all trials of all calls ended."""
        here = {end.trial.number: end for end in self.ends}
        earlier = [self._earlier(scored) for scored in self.study.scored() if scored.number not in here]
        return [*earlier, *here.values()]

    def _earlier(self, scored: Proposal) -> TrialEnd:
        trial = self.trial_of(scored)
        return TrialEnd(trial=trial, state="finished", score=scored.score)
