"""The search for a selection: the winner, the limit of calls, the explanation."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddm_core.artifacts import CorruptArtifact, write_json
from ensemble.config import SamplingConfig, SelectionSearchConfig
from ensemble.ensemble import Ensemble
from ensemble.evaluation import selection_search
from ensemble.evaluation.feature_space import HeldOutSpace
from ensemble.evaluation.reference import EvaluationError
from ensemble.evaluation.selection_search import SelectionChoice, SelectionTrial, read_choice
from ensemble.sampling.sample import sample
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from router.config import SelectionConfig, SelectionName, selection_label
from tests.oracles import IdentityCodec, MixtureOfGaussians

RANKED = "efficientnet_lite0"


def trial(name: str, first: float, second: float, calls: float = 1.0) -> SelectionTrial:
    fd = {RANKED: float(first), "pixels": float(second)}
    return SelectionTrial(
        selection=SelectionConfig(name=name),
        fd=fd,
        fd_std={RANKED: 1e-3, "pixels": 1e-3},
        kid={RANKED: -0.1},
        calls=calls,
    )


def best_candidate(trials: Sequence[SelectionTrial], max_calls: float, held_out: int = 1000) -> SelectionChoice:
    return selection_search.best_candidate(trials, max_calls, held_out)


def test_loss_in_another_space_outweighs_a_gain() -> None:
    """Top-1's pattern: 10 % better in one space, eight times worse in the other."""
    trials = [trial("sticky", 27, 1.72), trial("top_k", 24.4, 14.0), trial("coupled_resample", 26, 1.9)]
    choice = best_candidate(trials, 1.25)
    assert (choice.name, choice.selection.name) == ("coupled_resample", "coupled_resample")
    assert choice.candidates[0].relative == pytest.approx({RANKED: 27 / 24.4, "pixels": 1})
    assert best_candidate(trials[:2], 1.25).name == "sticky"


def test_candidate_with_too_many_calls_is_not_chosen() -> None:
    choice = best_candidate(
        [trial("sticky", 2, 2), trial("full", 1, 1, calls=8.0), trial("threshold", 3, 3, calls=1.25)], 1.25
    )
    assert choice.name == "sticky"
    assert [candidate.is_affordable for candidate in choice.candidates] == [True, False, True]
    assert choice.candidates[0].relative == {RANKED: 2, "pixels": 2}


def test_first_of_equal_candidates_is_chosen() -> None:
    assert best_candidate([trial("sticky_resample", 2, 1), trial("sticky", 2, 1)], 1.25).name == "sticky_resample_0.5"


@pytest.mark.parametrize(("held_out", "error"), [(499, 1e-3), (1000, 1.0)])
def test_first_candidate_stays_without_a_clear_difference(held_out: int, error: float) -> None:
    trials = [replace(trial(*row), fd_std={RANKED: error}) for row in (("sticky", 2, 2), ("sticky_resample", 1, 1))]
    choice = best_candidate(trials, 1.25, held_out)
    assert choice.name == "sticky"
    assert ("499 held-out images no other is ranked" if held_out == 499 else "none is clearly better") in choice.why
    assert (
        best_candidate([replace(row, fd_std={RANKED: 1e-3}) for row in trials], 1.25, 500).name == "sticky_resample_0.5"
    )


def test_choice_explains_itself() -> None:
    why = best_candidate([trial("sticky", 1.2, 1), trial("full", 1, 1, calls=8.0)], 1.25).why
    assert why.startswith("sticky has Fréchet distances of 1.20 in efficientnet_lite0 and 1.00 in pixels relative to")
    assert why.endswith("the first of the 1 that make at most 1.25 expert calls a step; none is clearly better.")


def test_no_affordable_candidate_raises_with_remedy() -> None:
    with pytest.raises(EvaluationError, match=r"fewest are 4.00: raise `selection_search.max_calls`, or add sticky"):
        best_candidate([trial("full", 1, 1, calls=8.0), trial("full_then_top1", 1, 1, calls=4.0)], 1.25)


def test_single_feature_space_raises() -> None:
    alone = SelectionTrial(
        selection=SelectionConfig(),
        fd={RANKED: 1.0},
        fd_std={},
        kid={RANKED: 0.0},
        calls=1.0,
    )
    with pytest.raises(EvaluationError, match="give `scores.spaces` both"):
        best_candidate([alone], 1.25)


def test_candidate_auto_raises() -> None:
    with pytest.raises(ValueError, match="remove it"):
        SelectionSearchConfig(candidates=(SelectionConfig(name="auto"),))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=6))
def test_choice_is_never_worse_than_the_first(distances: list[tuple[float, float]]) -> None:
    trials = [trial(name, *pair) for name, pair in zip(get_args(SelectionName), distances, strict=False)]
    selection = best_candidate(trials, 2.0).selection
    chosen = next(row for row in trials if row.selection == selection)
    assert chosen.fd["efficientnet_lite0"] <= trials[0].fd["efficientnet_lite0"]
    assert chosen.fd["pixels"] <= 1.5 * trials[0].fd["pixels"]


def test_written_choice_is_read_back(tmp_path: Path) -> None:
    choice = best_candidate([trial("full_then_sticky", 1, 1), trial("sticky", 2, 2)], 1.25)
    write_json(tmp_path / "selection_choice.json", choice)
    assert read_choice(tmp_path) == choice
    write_json(tmp_path / "selection_choice.json", {"name": "best"})
    with pytest.raises(CorruptArtifact, match="another version"):
        read_choice(tmp_path)


def test_best_selection_of_a_toy_ensemble_is_chosen() -> None:
    """With exact experts and one large cluster, exact selections must beat those that favor the largest cluster."""
    mixture = MixtureOfGaussians((0.5, 0.2, 0.2, 0.1))
    ensemble = Ensemble(experts=mixture.experts(), noise_schedule=RECTIFIED_FLOW, router=mixture.router())
    rng = np.random.default_rng(0)
    components = rng.choice(4, 600, p=mixture.shares)
    real = mixture.means.numpy()[components] + mixture.deviation * rng.standard_normal((600, 2))
    views = {
        RANKED: lambda x: x,
        "pixels": lambda x: np.stack([np.arctan2(x[:, 1], x[:, 0]), np.hypot(*x.T)], 1),
    }

    def run_trial(selection: SelectionConfig) -> SelectionTrial:
        config = SamplingConfig(solver="euler", steps=25, selection=selection)
        result = sample(ensemble, IdentityCodec(), range(600), config)
        scores = {
            name: HeldOutSpace.fit("pixels", view(real).astype(np.float32), 2, 3).compare(
                view(result.latents.double().numpy()).astype(np.float32), 3
            )
            for name, view in views.items()
        }
        return SelectionTrial(
            selection=selection,
            fd={name: score.fd for name, score in scores.items()},
            fd_std=dict.fromkeys(views, 1e-9),
            kid={},
            calls=result.calls_per_step,
        )

    names = ("top_k", "full_then_top1", "sticky", "full")
    choice = best_candidate([run_trial(SelectionConfig(name=name)) for name in names], 1.25)
    assert choice.name == selection_label(SelectionConfig(name="sticky"))
    assert [candidate.is_affordable for candidate in choice.candidates] == [True, False, True, False]
    assert choice.candidates[0].fd["efficientnet_lite0"] > 5 * choice.candidates[2].fd["efficientnet_lite0"]
