"""The sweep's Optuna study: proposals and their scores. No other file imports Optuna.

The state is one journal of JSON lines, which Optuna replays; no sampler state is stored. The sampler of the nth trial
is seeded by (seed, n), so a killed and restarted sweep proposes the same values as an undisturbed one.
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
"""Name of the study's attribute with everything that its scores depend on; equal in every call of one sweep."""


class Study:
    """Proposals and scores; a proposal stays open until it has a score, across any number of calls."""

    def __init__(self, journal: Path, axes: Sequence[Axis], config: OptunaConfig, *, is_parallel: bool) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        _repair_journal(journal)
        self._axes = {axis.key: axis for axis in axes}
        self._space = {axis.key: _to_distribution(axis) for axis in axes}
        self._config, self._is_parallel = config, is_parallel
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name="sweep",
            direction=config.direction,
            load_if_exists=True,
        )

    def check_comparable(self, fixed: Sequence[str], metric: str) -> None:
        """Raise `ConfigError` if the journal's trials are not comparable with those of this call."""
        space = {key: sorted(axis.choices) or "number" for key, axis in self._axes.items()}
        current = {"metric": metric, "direction": self._config.direction, "swept": space, "fixed": sorted(fixed)}
        previous = self._study.user_attrs.get(MEANING)
        if previous is None:
            self._study.set_user_attr(MEANING, current)
        elif previous != current:
            changed = [
                f"{key}: {previous.get(key)} before, {current[key]} now"
                for key in current
                if previous.get(key) != current[key]
            ]
            raise ConfigError(
                "the trials of an Optuna study must be comparable, and this folder has other settings; choose another "
                "folder=…, or restore these settings\n  " + "\n  ".join(changed)
            )

    @property
    def total(self) -> int:
        """Return the number of proposed trials."""
        return len(self.open_proposals()) + len(self.scored_proposals())

    def open_proposals(self) -> list[Proposal]:
        """Return proposals without a score; they continue under the same number.

        A proposal that was being written when the sweep was killed has not run. It is closed and its number is skipped.
        """
        proposals = []
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.params.keys() == self._space.keys():
                proposals.append(self._proposal(trial))
            else:
                self._study.tell(trial.number, state=TrialState.FAIL)
        return proposals

    def scored_proposals(self) -> list[Proposal]:
        """Return proposals with a score."""
        return [self._proposal(trial) for trial in self._study.get_trials(False, (TrialState.COMPLETE,))]

    def propose(self) -> Proposal:
        """Add a proposal."""
        self._study.sampler = TPESampler(
            seed=int(np.random.SeedSequence((self._config.seed, self.total)).generate_state(1)[0]),
            n_startup_trials=self._config.startup,
            constant_liar=self._is_parallel,
        )
        trial = self._study.ask(self._space)
        return Proposal(number=trial.number, parameters=self._format_values(trial.params))

    def record(self, number: int, score: float) -> None:
        """Close a proposal with its score."""
        self._study.tell(number, score)

    def _proposal(self, trial: FrozenTrial) -> Proposal:
        score = trial.value if trial.state == TrialState.COMPLETE else None
        return Proposal(number=trial.number, parameters=self._format_values(trial.params), score=score)

    def _format_values(self, params: Mapping[str, str | float]) -> dict[str, str]:
        return {key: self._axes[key].format_value(value) for key, value in params.items()}


def _to_distribution(axis: Axis) -> BaseDistribution:
    if axis.choices:
        return CategoricalDistribution(axis.choices)
    try:
        if axis.is_integer:
            return IntDistribution(int(axis.low), int(axis.high), log=axis.is_log, step=int(axis.step or 1))
        return FloatDistribution(axis.low, axis.high, log=axis.is_log, step=axis.step)
    except ValueError as error:
        raise ConfigError(f"{axis.key}: {error}") from None


def _repair_journal(journal: Path) -> None:
    """Remove the leftovers of a killed sweep: an incomplete last line and the lock file."""
    journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)
    if journal.is_file():
        os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)
