"""Optuna: what to try next, and what came of it; the one file that imports it.

All that it knows lies in one journal of JSON lines, which it replays; no sampler's state is kept. Instead the sampler
of the nth trial is seeded by (seed, n), so a sweep that was killed proposes what one that was not would have proposed.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from orchestrator.errors import ConfigError
from orchestrator.sweeps.config import OptunaConfig
from orchestrator.sweeps.search_space import Axis, Proposal

MEANING = "meaning"
"""Name of the study's attribute that says what its scores mean: the same in every call of one sweep."""


class Study:
    """Proposals and scores; a proposal stays open until it has a score, over any number of calls."""

    def __init__(self, journal: Path, axes: Sequence[Axis], config: OptunaConfig, *, is_parallel: bool) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        _mend(journal)
        self._axes = {axis.key: axis for axis in axes}
        self._space = {axis.key: _distribution(axis) for axis in axes}
        self._config, self._is_parallel = config, is_parallel
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name="sweep",
            direction=config.direction,
            load_if_exists=True,
        )

    def refuse_other_meaning(self, fixed: Sequence[str], metric: str) -> None:
        """Raise `ConfigError` if the journal's trials cannot be compared with those that are asked for now."""
        space = {key: sorted(axis.choices) or "number" for key, axis in self._axes.items()}
        asked = {"metric": metric, "direction": self._config.direction, "swept": space, "fixed": sorted(fixed)}
        known = self._study.user_attrs.get(MEANING)
        if known is None:
            self._study.set_user_attr(MEANING, asked)
        elif known != asked:
            changed = [
                f"{key}: {known.get(key)} before, {asked[key]} now" for key in asked if known.get(key) != asked[key]
            ]
            raise ConfigError(
                "this folder holds an Optuna sweep whose trials cannot be compared with what is asked for now; choose "
                "another folder=…, or the values of before\n  " + "\n  ".join(changed)
            )

    @property
    def total(self) -> int:
        """Trials that have been proposed so far."""
        return len(self.open()) + len(self.scored())

    def open(self) -> list[Proposal]:
        """Proposals without a score: to be gone on with under the same number, not to be made again.

        One that was being written when the sweep was killed has not run; it is closed, and its number not used again.
        """
        whole = []
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.params.keys() == self._space.keys():
                whole.append(self._proposal(trial))
            else:
                self._study.tell(trial.number, state=TrialState.FAIL)
        return whole

    def scored(self) -> list[Proposal]:
        """Proposals with a score."""
        return [self._proposal(trial) for trial in self._study.get_trials(False, (TrialState.COMPLETE,))]

    def propose(self) -> Proposal:
        """One more proposal."""
        self._study.sampler = TPESampler(
            seed=int(np.random.SeedSequence((self._config.seed, self.total)).generate_state(1)[0]),
            n_startup_trials=self._config.startup,
            constant_liar=self._is_parallel,
        )
        trial = self._study.ask(self._space)
        return Proposal(number=trial.number, parameters=self._texts(trial.params))

    def record(self, number: int, score: float) -> None:
        """Close a proposal with its score."""
        self._study.tell(number, score)

    def _proposal(self, trial: FrozenTrial) -> Proposal:
        score = trial.value if trial.state == TrialState.COMPLETE else None
        return Proposal(number=trial.number, parameters=self._texts(trial.params), score=score)

    def _texts(self, params: Mapping[str, str | float]) -> dict[str, str]:
        return {key: self._axes[key].text(value) for key, value in params.items()}


def _distribution(axis: Axis) -> BaseDistribution:
    if axis.choices:
        return CategoricalDistribution(axis.choices)
    try:
        if axis.is_whole:
            return IntDistribution(int(axis.low), int(axis.high), log=axis.is_log, step=int(axis.step or 1))
        return FloatDistribution(axis.low, axis.high, log=axis.is_log, step=axis.step)
    except ValueError as error:
        raise ConfigError(f"{axis.key}: {error}") from None


def _mend(journal: Path) -> None:
    """Take away what a killed sweep left half-done: a torn last line, and the lock that it held."""
    journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)
    if journal.is_file():
        os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)
