"""Search for the best selection of an ensemble: a short trial of each, scored against held-out images.

    candidates ──► images, from the same seeds ──► Fréchet distances in every space ──► selection_choice.json

A candidate's score is its Fréchet distance in the space that ranks, relative to that of the best candidate. A gain in
one space alone is not a gain: top-1 has won one space by 27 % and lost another sevenfold. So a candidate must not lose
much in any other space, and must be clearly better than the first affordable candidate; otherwise that one stays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ddm_core.artifacts import CorruptArtifact, Workspace, read_json, write_json
from ensemble.config import EvaluationConfig, SamplingConfig, SelectionSearchConfig
from ensemble.evaluation.generate import generate
from ensemble.evaluation.held_out_prompts import load_held_out_prompts
from ensemble.evaluation.reference import EvaluationError
from ensemble.evaluation.scoring import Reference
from ensemble.evaluation.spaces import MIN_RANKED_HELD_OUT, RANKED_SPACE, is_clear
from router.config import SelectionConfig, selection_label

CHOICE_FILE = "selection_choice.json"
LARGEST_LOSS = 1.5
"""Largest Fréchet distance in any other space, relative to the first affordable candidate's."""
FIRST_SEED = 2**40
"""Seeds of the trials start here, scores use 0, 1, 2 …: no selection is scored on the seeds that chose it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionTrial:
    """Scores of one candidate."""

    selection: SelectionConfig
    fd: Mapping[str, float]
    """Fréchet distance to the held-out images, by space."""
    fd_std: Mapping[str, float]
    """Standard error of `fd`, in the spaces that rank."""
    kid: Mapping[str, float]
    """In the spaces that rank."""
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
    reflects: bool = False
    """Whether the configured reflection is clearly better than the selection without it."""


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

    If `sampling` reflects, the best candidate is tried with and without it too, in the steps of the scores.

    Raises `EvaluationError` if the reference was built for another evaluation, if it lacks a space, or if every
    candidate makes more than `config.max_calls` calls.
    """
    loaded = Reference.load(reference, evaluation)
    seeds = [FIRST_SEED + evaluation.seed * config.num_samples + number for number in range(config.num_samples)]
    conditional = evaluation.conditional
    prompts = load_held_out_prompts(reference, config.num_samples, pipeline_folder) if conditional else None
    branches = 2 if prompts is not None and sampling.guidance_scale != 1 else 1
    flops = 0.0

    def attempt(tried: SamplingConfig) -> SelectionTrial:
        nonlocal flops
        generated = generate(pipeline_folder, seeds, prompts, tried, workspace)
        features = loaded.extract(generated.images)
        scores = {name: loaded.compare_space(name, features.spaces[name]) for name in loaded.config.spaces}
        flops += generated.flops + features.flops
        return SelectionTrial(
            selection=tried.selection,
            fd={name: score.fd for name, score in scores.items()},
            fd_std={name: score.fd_std for name, score in scores.items() if score.fd_std is not None},
            kid={name: score.kid for name, score in scores.items() if score.kid is not None},
            calls=generated.calls.per_evaluation / branches,
        )

    plain, held_out = replace(sampling, reflection=None), loaded.statistics["summary"]["held_out"]
    short = replace(plain, steps=config.steps)
    trials = [attempt(replace(short, selection=selection)) for selection in dict.fromkeys(config.candidates)]
    choice = best_candidate(trials, config.max_calls, held_out)
    if sampling.reflection is not None:
        with_it, without = (attempt(replace(tried, selection=choice.selection)) for tried in (sampling, plain))
        choice = replace(choice, reflects=_is_better(with_it, without, held_out))
    write_json(out / CHOICE_FILE, choice)
    return flops


def best_candidate(trials: Sequence[SelectionTrial], max_calls: float, held_out: int) -> SelectionChoice:
    """Return the best candidate that is clearly better than the first affordable one, or else that one."""
    spaces = list(trials[0].fd)
    if RANKED_SPACE not in spaces or len(spaces) < 2:
        raise EvaluationError(
            f"a search ranks by {RANKED_SPACE} and needs a second feature space, and there is only "
            f"{', '.join(spaces)}: give `scores.spaces` both, or name a selection instead of auto"
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
    first = trials[affordable[0]]
    better = [number for number in affordable if _is_better(trials[number], first, held_out)]
    chosen = min(better, key=lambda number: trials[number].fd[RANKED_SPACE], default=affordable[0])
    return SelectionChoice(
        selection=trials[chosen].selection,
        name=candidates[chosen].name,
        why=_explain(candidates[chosen], len(affordable), max_calls, held_out, is_first=chosen == affordable[0]),
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


def _is_better(trial: SelectionTrial, other: SelectionTrial, held_out: int) -> bool:
    """Return whether a trial is clearly better in the space that ranks, and not much worse in any other."""
    difference = trial.fd[RANKED_SPACE] - other.fd[RANKED_SPACE]
    return (
        held_out >= MIN_RANKED_HELD_OUT
        and difference < 0
        and is_clear(difference, trial.fd_std[RANKED_SPACE], other.fd_std[RANKED_SPACE])
        and all(fd <= LARGEST_LOSS * other.fd[space] for space, fd in trial.fd.items())
    )


def _candidate(trial: SelectionTrial, best: Mapping[str, float], max_calls: float) -> Candidate:
    relative = {space: fd / best[space] for space, fd in trial.fd.items()}
    return Candidate(
        name=selection_label(trial.selection),
        fd=trial.fd,
        kid=trial.kid,
        relative=relative,
        calls=trial.calls,
        is_affordable=trial.calls <= max_calls,
    )


def _explain(chosen: Candidate, count: int, max_calls: float, held_out: int, *, is_first: bool) -> str:
    """Return the reason in one sentence."""
    parts = " and ".join(f"{ratio:.2f} in {space}" for space, ratio in chosen.relative.items())
    distances = f"{chosen.name} has Fréchet distances of {parts} relative to the best of all candidates"
    among = f"the {count} that make at most {max_calls:g} expert calls a step"
    if not is_first:
        return f"{distances}, and is the best of those that are clearly better than the first of {among}."
    if held_out < MIN_RANKED_HELD_OUT:
        reason = f"against {held_out} held-out images no other is ranked, which needs {MIN_RANKED_HELD_OUT}"
    else:
        reason = "none is clearly better"
    return f"{distances}, and is the first of {among}; {reason}."
