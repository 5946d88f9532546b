"""Search for the best selection of an ensemble: a short trial of each, scored against held-out images.

    candidates ──► images, from the same seeds ──► Fréchet distances in every space ──► selection_choice.json

A gain in one space alone is not a gain: top-1 has won one space by 27 % and lost the other sevenfold. The score of a
candidate is therefore a geometric mean over the spaces. It averages the distance relative to that of the best candidate
in a space. The distance is Fréchet's because KID may be below zero and has no ratios; the table also lists KID.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ddm_core.artifacts import CorruptArtifact, Workspace, read_json, write_json
from ensemble.config import EvaluationConfig, SamplingConfig, SelectionSearchConfig
from ensemble.evaluation.evaluate import load_held_out_classes
from ensemble.evaluation.generate import generate
from ensemble.evaluation.reference import EvaluationError
from ensemble.evaluation.scoring import Reference
from router.config import SelectionConfig, selection_label

CHOICE_FILE = "selection_choice.json"
FIRST_SEED = 2**40
"""Seeds of the trials start here, scores use 0, 1, 2 …: no selection is scored on the seeds that chose it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionTrial:
    """Scores of one candidate."""

    selection: SelectionConfig
    fd: Mapping[str, float]
    """Fréchet distance to the held-out images, by space."""
    kid: Mapping[str, float]
    calls: float
    """Expert calls per image and velocity evaluation, for each branch of guidance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One row of the table of candidates."""

    name: str
    fd: Mapping[str, float]
    kid: Mapping[str, float]
    relative: Mapping[str, float]
    """Fréchet distance over that of the best candidate, by space."""
    mean: float
    """Geometric mean of `relative`; smaller is better."""
    calls: float
    is_affordable: bool
    """Whether its calls are within the limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionChoice:
    """The best selection and the reason."""

    selection: SelectionConfig
    name: str
    why: str
    candidates: tuple[Candidate, ...]


def search_selection(
    pipeline_folder: Path,
    reference: Path,
    config: SelectionSearchConfig,
    evaluation: EvaluationConfig,
    sampling: SamplingConfig,
    out: Path,
    workspace: Workspace,
) -> float:
    """Score every candidate without reflection, write `out/selection_choice.json`, and return the FLOPs.

    Raises `EvaluationError` if the reference was built for another evaluation, if it has fewer than two spaces, or if
    every candidate makes more than `config.max_calls` calls.
    """
    loaded = Reference.load(reference, evaluation)
    seeds = [FIRST_SEED + evaluation.seed * config.num_samples + number for number in range(config.num_samples)]
    class_ids = load_held_out_classes(reference, config.num_samples) if evaluation.conditional else None
    branches = 2 if class_ids is not None and sampling.guidance_scale != 1 else 1
    trials, flops = [], 0.0
    for selection in dict.fromkeys(config.candidates):
        short = replace(sampling, selection=selection, steps=config.steps, reflection=None)
        generated = generate(pipeline_folder, seeds, class_ids, short, workspace)
        features = loaded.extract(generated.images)
        scores = {name: loaded.compare_space(name, features.spaces[name]) for name in loaded.config.spaces}
        trial = SelectionTrial(
            selection=selection,
            fd={name: score.fd for name, score in scores.items()},
            kid={name: score.kid for name, score in scores.items()},
            calls=generated.calls.per_evaluation / branches,
        )
        trials.append(trial)
        flops += generated.flops + features.flops
    write_json(out / CHOICE_FILE, best_candidate(trials, config.max_calls))
    return flops


def best_candidate(trials: Sequence[SelectionTrial], max_calls: float) -> SelectionChoice:
    """Return the first candidate of the smallest mean among those with at most `max_calls` expert calls."""
    spaces = list(trials[0].fd)
    if len(spaces) < 2:
        raise EvaluationError(
            f"a search needs two feature spaces, and there is only {', '.join(spaces)}: "
            "give `scores.spaces` two of them, or name a selection instead of auto"
        )
    best = {space: min(trial.fd[space] for trial in trials) for space in spaces}
    candidates = tuple(_candidate(trial, best, max_calls) for trial in trials)
    affordable = [number for number, candidate in enumerate(candidates) if candidate.is_affordable]
    if not affordable:
        fewest = min(trial.calls for trial in trials)
        raise EvaluationError(
            f"no candidate makes at most {max_calls:g} expert calls a step, the fewest are {fewest:.2f}: "
            "raise `selection_search.max_calls`, or add sticky to `selection_search.candidates`, which makes one"
        )
    ranked = sorted(affordable, key=lambda number: candidates[number].mean)
    return SelectionChoice(
        selection=trials[ranked[0]].selection,
        name=candidates[ranked[0]].name,
        why=_explain([candidates[number] for number in ranked], len(candidates), max_calls),
        candidates=candidates,
    )


def read_choice(folder: Path) -> SelectionChoice:
    """Read the `selection_choice.json` of a folder; raise `CorruptArtifact` if it is invalid."""
    choice = read_json(folder / CHOICE_FILE)
    try:
        return TypeAdapter(SelectionChoice).validate_python(choice)
    except ValidationError as error:
        raise CorruptArtifact(
            f"{folder / CHOICE_FILE} was written by another version: {error}; run the search again"
        ) from error


def _candidate(trial: SelectionTrial, best: Mapping[str, float], max_calls: float) -> Candidate:
    relative = {space: fd / best[space] for space, fd in trial.fd.items()}
    return Candidate(
        name=selection_label(trial.selection),
        fd=trial.fd,
        kid=trial.kid,
        relative=relative,
        mean=math.exp(sum(map(math.log, relative.values())) / len(relative)),
        calls=trial.calls,
        is_affordable=trial.calls <= max_calls,
    )


def _explain(ranked: Sequence[Candidate], count: int, max_calls: float) -> str:
    """Return the reason in one sentence."""
    first = ranked[0]
    parts = " and ".join(f"{ratio:.2f} in {space}" for space, ratio in first.relative.items())
    others = f", {ranked[1].name} follows with {ranked[1].mean:.2f}" if len(ranked) > 1 else ""
    return (
        f"{first.name} has Fréchet distances of {parts} relative to the best of {count} candidates, and the smallest "
        f"geometric mean ({first.mean:.2f}{others}) of the {len(ranked)} that make at most {max_calls:g} expert calls "
        "a step."
    )
