"""The search for a selection: the winner, the limit of calls, the explanation."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddm_core.artifacts import CorruptArtifact, write_json
from ensemble.config import SamplingConfig, SelectionSearchConfig
from ensemble.ensemble import Ensemble
from ensemble.evaluation.feature_space import HeldOutSpace
from ensemble.evaluation.reference import EvaluationError
from ensemble.evaluation.selection_search import SelectionTrial, best_candidate, read_choice
from ensemble.sampling.sample import sample
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from router.config import SelectionConfig, SelectionName, selection_label
from tests.oracles import IdentityCodec, MixtureOfGaussians


def trial(name: str, first: float, second: float, calls: float = 1.0) -> SelectionTrial:
    fd = {"a": float(first), "b": float(second)}
    return SelectionTrial(selection=SelectionConfig(name=name), fd=fd, kid={"a": -0.1, "b": 0.2}, calls=calls)


def test_smallest_geometric_mean_wins() -> None:
    """Top-1's pattern: 27 % better in one space, seven times worse in the other."""
    choice = best_candidate(
        [trial("sticky", 27, 1.72), trial("top_k", 24.4, 14.0), trial("coupled_resample", 33, 1.9)], 1.25
    )
    assert (choice.name, choice.selection.name) == ("sticky", "sticky")
    sticky, top_1, _ = choice.candidates
    assert sticky.relative == pytest.approx({"a": 27 / 24.4, "b": 1})
    assert sticky.mean == pytest.approx((27 / 24.4) ** 0.5)
    assert top_1.mean == pytest.approx((14 / 1.72) ** 0.5)


def test_candidate_with_too_many_calls_is_not_chosen() -> None:
    choice = best_candidate(
        [trial("sticky", 2, 2), trial("full", 1, 1, calls=8.0), trial("threshold", 3, 3, calls=1.25)], 1.25
    )
    assert choice.name == "sticky"
    assert [candidate.is_affordable for candidate in choice.candidates] == [True, False, True]
    assert choice.candidates[0].relative == {"a": 2, "b": 2}


def test_first_of_equal_candidates_is_chosen() -> None:
    assert best_candidate([trial("sticky_resample", 2, 1), trial("sticky", 1, 2)], 1.25).name == "sticky_resample_0.5"


def test_choice_explains_itself() -> None:
    why = best_candidate([trial("sticky", 1.2, 1), trial("top_k", 1, 4), trial("full", 1, 1, calls=8.0)], 1.25).why
    assert why.startswith(
        "sticky has Fréchet distances of 1.20 in a and 1.00 in b relative to the best of 3 candidates"
    )
    assert "smallest geometric mean (1.10, top_k_1 follows with 2.00)" in why
    assert why.endswith("of the 2 that make at most 1.25 expert calls a step.") and why.count(". ") == 0


def test_no_affordable_candidate_raises_with_remedy() -> None:
    with pytest.raises(EvaluationError, match=r"fewest are 4.00: raise `selection_search.max_calls`, or add sticky"):
        best_candidate([trial("full", 1, 1, calls=8.0), trial("full_then_top1", 1, 1, calls=4.0)], 1.25)


def test_single_feature_space_raises() -> None:
    alone = SelectionTrial(selection=SelectionConfig(), fd={"a": 1.0}, kid={"a": 0.0}, calls=1.0)
    with pytest.raises(EvaluationError, match="give `scores.spaces` two"):
        best_candidate([alone], 1.25)


def test_candidate_auto_raises() -> None:
    with pytest.raises(ValueError, match="remove it"):
        SelectionSearchConfig(candidates=(SelectionConfig(name="auto"),))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=6), st.floats(0.1, 10))
def test_choice_does_not_depend_on_units(distances: list[tuple[float, float]], unit: float) -> None:
    names = get_args(SelectionName)
    plain = best_candidate([trial(name, *pair) for name, pair in zip(names, distances, strict=False)], 2.0)
    scaled = best_candidate([trial(name, unit * a, b) for name, (a, b) in zip(names, distances, strict=False)], 2.0)
    means = [candidate.mean for candidate in plain.candidates]
    assert min(means) == pytest.approx(means[names.index(scaled.selection.name)], rel=1e-6)


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
    views = {"plain": lambda x: x, "angles": lambda x: np.stack([np.arctan2(x[:, 1], x[:, 0]), np.hypot(*x.T)], 1)}

    def run_trial(selection: SelectionConfig) -> SelectionTrial:
        config = SamplingConfig(solver="euler", steps=25, selection=selection)
        result = sample(ensemble, IdentityCodec(), range(600), config)
        scores = {
            name: HeldOutSpace.fit(view(real).astype(np.float32), 2, 3).compare(
                view(result.latents.double().numpy()).astype(np.float32), 3
            )
            for name, view in views.items()
        }
        return SelectionTrial(
            selection=selection,
            fd={name: score.fd for name, score in scores.items()},
            kid={name: score.kid for name, score in scores.items()},
            calls=result.calls_per_step,
        )

    names = ("top_k", "full_then_top1", "sticky", "full")
    choice = best_candidate([run_trial(SelectionConfig(name=name)) for name in names], 1.25)
    assert choice.name == selection_label(SelectionConfig(name="sticky"))
    assert [candidate.is_affordable for candidate in choice.candidates] == [True, False, True, False]
    assert choice.candidates[0].mean > 5 * choice.candidates[2].mean
