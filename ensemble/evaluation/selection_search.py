"""Which selection suits an ensemble: a short trial of each, scored against held-out images.

    candidates ──► images, from the same seeds ──► Fréchet distances in every space ──► choice.json

A gain in one space alone is not a gain (top-1 has won one space by 27 % and lost the other sevenfold), so a candidate
counts by the geometric mean over the spaces of its distance relative to the best candidate's there. It is the Fréchet
distance because KID may be below zero and has no ratios; KID stands beside it in the table.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ddm_core.artifacts import CorruptArtifact, Workspace, read_json, write_json
from ensemble.config import EvaluationConfig, SamplingConfig, SelectionSearchConfig
from ensemble.evaluation.evaluate import held_out_classes
from ensemble.evaluation.generate import generate
from ensemble.evaluation.reference import EvaluationError
from ensemble.evaluation.scoring import Reference
from router.config import SelectionConfig, selection_label

CHOICE_FILE = "selection_choice.json"
FIRST_SEED = 2**40
"""Scores draw their images from the seeds 0, 1, 2 …; a choice from here on, so that none is scored by its own luck."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionTrial:
    """What one candidate gave."""

    selection: SelectionConfig
    fd: Mapping[str, float]
    """Fréchet distance to the held-out images, by space."""
    kid: Mapping[str, float]
    calls: float
    """Expert calls for one image in one evaluation of a velocity, by each branch of guidance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One row of the table that the choice was made from."""

    name: str
    fd: Mapping[str, float]
    kid: Mapping[str, float]
    relative: Mapping[str, float]
    """Its Fréchet distance over the best candidate's, by space."""
    mean: float
    """Geometric mean of `relative`: the smaller, the better."""
    calls: float
    is_affordable: bool
    """Whether it makes few enough calls to be chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionChoice:
    """The selection that was chosen, and why."""

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
    """Try every candidate, write `out/choice.json`, and return the FLOPs it took; reflection is left out of it.

    Raises `EvaluationError` if the reference was made for another evaluation, if it has fewer than two spaces, or if
    every candidate makes more than `config.most_calls` calls.
    """
    real = Reference.load(reference, evaluation)
    seeds = [FIRST_SEED + evaluation.seed * config.num_samples + number for number in range(config.num_samples)]
    class_ids = held_out_classes(reference, config.num_samples) if evaluation.conditional else None
    branches = 2 if class_ids is not None and sampling.guidance_scale != 1 else 1
    trials, flops = [], 0.0
    for selection in dict.fromkeys(config.candidates):
        short = replace(sampling, selection=selection, steps=config.steps, reflection=None)
        drawn = generate(pipeline_folder, seeds, class_ids, short, workspace)
        found = real.extract(drawn.images)
        scores = {name: real.score_space(name, found.spaces[name]) for name in real.config.spaces}
        trial = SelectionTrial(
            selection=selection,
            fd={name: score.fd for name, score in scores.items()},
            kid={name: score.kid for name, score in scores.items()},
            calls=drawn.calls.per_evaluation / branches,
        )
        trials.append(trial)
        flops += drawn.flops + found.flops
    write_json(out / CHOICE_FILE, best_candidate(trials, config.max_calls))
    return flops


def best_candidate(trials: Sequence[SelectionTrial], most_calls: float) -> SelectionChoice:
    """The candidate of the smallest mean among those with at most `most_calls` expert calls; of equals the first."""
    spaces = list(trials[0].fd)
    if len(spaces) < 2:
        raise EvaluationError(
            f"a gain in one feature space alone is not a gain, and there is only {', '.join(spaces)}: "
            "give `scores.spaces` two of them, or name a selection instead of auto"
        )
    best = {space: min(trial.fd[space] for trial in trials) for space in spaces}
    candidates = tuple(_candidate(trial, best, most_calls) for trial in trials)
    affordable = [number for number, candidate in enumerate(candidates) if candidate.is_affordable]
    if not affordable:
        fewest = min(trial.calls for trial in trials)
        raise EvaluationError(
            f"no candidate makes at most {most_calls:g} expert calls a step, the fewest are {fewest:.2f}: "
            "raise `selection_search.max_calls`, or add sticky to `selection_search.candidates`, which makes one"
        )
    ranked = sorted(affordable, key=lambda number: candidates[number].mean)
    return SelectionChoice(
        selection=trials[ranked[0]].selection,
        name=candidates[ranked[0]].name,
        why=_why([candidates[number] for number in ranked], len(candidates), most_calls),
        candidates=candidates,
    )


def read_choice(folder: Path) -> SelectionChoice:
    """Read the `selection_choice.json` of a choice's folder; raises `CorruptArtifact` if it is not one."""
    found = read_json(folder / CHOICE_FILE)
    try:
        return TypeAdapter(SelectionChoice).validate_python(found)
    except ValidationError as error:
        raise CorruptArtifact(f"{folder / CHOICE_FILE} was written by another version: {error}") from error


def _candidate(trial: SelectionTrial, best: Mapping[str, float], most_calls: float) -> Candidate:
    relative = {space: fd / best[space] for space, fd in trial.fd.items()}
    return Candidate(
        name=selection_label(trial.selection),
        fd=trial.fd,
        kid=trial.kid,
        relative=relative,
        mean=math.exp(sum(map(math.log, relative.values())) / len(relative)),
        calls=trial.calls,
        is_affordable=trial.calls <= most_calls,
    )


def _why(ranked: Sequence[Candidate], tried: int, most_calls: float) -> str:
    """One sentence for people."""
    first = ranked[0]
    parts = " and ".join(f"{ratio:.2f} in {space}" for space, ratio in first.relative.items())
    others = f", {ranked[1].name} follows with {ranked[1].mean:.2f}" if len(ranked) > 1 else ""
    return (
        f"{first.name} has Fréchet distances of {parts} relative to the best of {tried} candidates, and the smallest "
        f"geometric mean ({first.mean:.2f}{others}) of the {len(ranked)} that make at most {most_calls:g} expert calls "
        "a step."
    )
