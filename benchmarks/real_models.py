"""Text to image through the ensemble (`make bench-real-models`): demo and emoji, beside a FLOP-matched monolith.

Both experiments run with every seed, or go on where an earlier call stopped; runs that have been measured are kept in
docs/benchmarks/results, to be deleted when an experiment changes. The claims read their scores: what samples of
held-out captions show, by probes of real pictures, and how much the caption says about the expert.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from benchmarks.record import RESULTS, Claim, Listing, describe_machine, median_and_range, write_result
from data_partition.datasets.captions import has_held_out_words
from ddm_core.artifacts import read_json, read_manifest, to_json, write_json
from ensemble.evaluation.reference import CAPTIONS
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.controller import project_commit, run_pipeline
from orchestrator.pipeline.graph import build_graph
from orchestrator.reporting.results import load_score_rows
from orchestrator.run.run_folder import RunFolder

EXPERIMENTS = ("demo", "emoji")
OURS, MONOLITH = "sticky", "monolith"

Scores = dict[str, dict[str, Any]]
"""The scores of a run by model."""


def main() -> None:
    """Run what is missing, write docs/benchmarks/real_models.json and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/real_models"), help="of the runs")
    parser.add_argument("--experiments", nargs="*", choices=EXPERIMENTS, default=[*EXPERIMENTS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs")
    arguments = parser.parse_args()
    for name in arguments.experiments:
        for seed in arguments.seeds:
            measure(name, seed, arguments.folder)
    runs = {name: load_results(name) for name in EXPERIMENTS}
    scores = {name: [run["scores"] for run in results] for name, results in runs.items()}
    quality = [run["quality"] for run in runs["emoji"]]
    shares = [run["new_share"] for run in runs["demo"]]
    claims = [*demo_claims(scores["demo"], shares), *emoji_claims(scores["emoji"]), *prior_claims(quality)]
    listings = [list_scores(name, scores[name]) for name in EXPERIMENTS]
    seconds = sum(run["seconds"] for results in runs.values() for run in results)
    latest = runs["demo"][-1]
    notes = [
        "Sticky selection, the default guidance. Seconds are those of all stages, one after the other.",
        *(f"{name}: {len(results)} seeds, commit {results[-1]['commit']}." for name, results in runs.items()),
    ]
    origin = {name: latest[name] for name in ("machine", "commit")}
    print(to_json(write_result("real_models", seconds, claims, listings, notes, **origin)))


def result_file(name: str, seed: int) -> Path:
    """Return where the scores of a run are kept."""
    return RESULTS / "results" / f"real_models-{name}-{seed}.json"


def measure(name: str, seed: int, root: Path) -> None:
    """Run an experiment and keep its scores, unless they are kept already."""
    file = result_file(name, seed)
    if file.exists():
        return
    run = run_experiment(name, seed, root)
    graph = build_graph(run.load_config())
    result = {
        "scores": load_scores(run),
        "quality": read_quality(run),
        "new_share": read_new_share(run),
        "seconds": sum(read_manifest(run.artifact(stage)).seconds for stage in graph),
    }
    write_json(file, result | {"machine": describe_machine(), "commit": project_commit()})


def load_results(name: str) -> list[dict[str, Any]]:
    """Return what is kept of an experiment, by seed."""
    return [dict(read_json(file)) for seed in range(10) if (file := result_file(name, seed)).exists()]


def run_experiment(name: str, seed: int, root: Path) -> RunFolder:
    """Run an experiment with the monolith in a folder of its own, or continue it."""
    folder = root / f"{name}-{seed}"
    overrides = [f"experiment={name}", f"folder={folder}", f"seed={seed}", "monolith=true", "wandb.mode=disabled"]
    run_pipeline(parse_config(compose(overrides)), Console(stderr=True))
    return RunFolder(folder)


def load_scores(run: RunFolder) -> Scores:
    """Return the scores of every model of a run."""
    return {row.name: row.scores for row in load_score_rows(run, build_graph(run.load_config()))}


def read_quality(run: RunFolder) -> dict[str, Any]:
    """Return the nats of p(k | text) and of p(k)."""
    router = next(stage for stage in build_graph(run.load_config()) if stage.kind == "router")
    quality = read_json(run.artifact(router) / "quality.json")
    return {name: quality[name] for name in ("prior_entropy", "prior_entropy_null")}


def read_new_share(run: RunFolder) -> float:
    """Return the share of the prompts that ask for a combination that was never trained on."""
    config = run.load_config()
    reference = next(stage for stage in build_graph(config) if stage.kind == "reference")
    captions = read_json(run.artifact(reference) / CAPTIONS)["held_out"][: config.scores.num_samples]
    return fmean(has_held_out_words(caption, config.scores.new_combinations) for caption in captions)


def demo_claims(runs: Sequence[Scores], new_shares: Sequence[float]) -> list[Claim]:
    """Return what the captions of the demo demand; the prompts have these shares of new combinations."""
    kinds = [run[OURS]["text"]["class_accuracy"] for run in runs]
    tones = [run[OURS]["text"]["attributes"]["tone"]["samples"] for run in runs]
    new_kinds = [run[OURS]["text"]["class_accuracy_new"] / kind for run, kind in zip(runs, kinds, strict=True)]
    known_kinds = [
        kind * (1 - share * new) / (1 - share) for kind, new, share in zip(kinds, new_kinds, new_shares, strict=True)
    ]
    new_tones = [run[OURS]["text"]["attributes"]["tone"]["new"] / tone for run, tone in zip(runs, tones, strict=True)]
    return [
        at_least("demo: the kind of the caption is right", 0.85, kinds),
        at_least("demo: the kind is right on combinations that were trained on", 0.85, known_kinds),
        at_least("demo: the tone of the caption is right", 0.9, tones),
        at_least("demo: the kind on combinations never trained on, as a share of all", 0.8, new_kinds),
        at_least("demo: the tone on combinations never trained on, as a share of all", 0.8, new_tones),
        at_most("demo: Fréchet distance of the ensemble by the monolith's", 1.0, relative(runs, frechet_distance)),
    ]


def emoji_claims(runs: Sequence[Scores]) -> list[Claim]:
    """Return what the held-out captions of the emoji demand."""
    recalls = [run[OURS]["text"]["recall"] / run[OURS]["text"]["recall_chance"] for run in runs]
    return [
        at_least("emoji: the category of the caption is right", 0.28, [category(run[OURS]) for run in runs]),
        at_least("emoji: the category, by the monolith's", 0.9, relative(runs, category)),
        at_least("emoji: recall of the caption at 20, by chance", 2.2, recalls),
        at_least("emoji: recall, by the monolith's", 0.9, relative(runs, recall)),
        at_most("emoji: kernel distance by the monolith's", 1.0, relative(runs, kernel_distance)),
    ]


def prior_claims(qualities: Sequence[dict[str, Any]]) -> list[Claim]:
    """Return what a caption says about the expert."""
    gains = [quality["prior_entropy_null"] - quality["prior_entropy"] for quality in qualities]
    return [at_least("emoji: nats that p(k given text) is below the entropy of p(k)", 0.3, gains)]


def frechet_distance(scores: dict[str, Any]) -> float:
    """Return the Fréchet distance in the features that rank."""
    return float(scores["spaces"]["efficientnet_lite0"]["fd"])


def kernel_distance(scores: dict[str, Any]) -> float:
    """Return the kernel distance in the features that rank."""
    return float(scores["spaces"]["efficientnet_lite0"]["kid"])


def category(scores: dict[str, Any]) -> float:
    """Return the share of samples of the class of their caption."""
    return float(scores["text"]["class_accuracy"])


def recall(scores: dict[str, Any]) -> float:
    """Return the share of samples whose caption is found."""
    return float(scores["text"]["recall"])


def relative(runs: Sequence[Scores], score: Callable[[dict[str, Any]], float]) -> list[float]:
    """Return a score of the ensemble by that of the monolith, for every run."""
    return [score(run[OURS]) / score(run[MONOLITH]) for run in runs]


def at_least(name: str, bar: float, values: Sequence[float]) -> Claim:
    """Return the claim that the mean of the values reaches the bar."""
    return Claim(name=name, bar=f"≥ {bar:g}", **_measured(values), holds=fmean(values) >= bar)


def at_most(name: str, bar: float, values: Sequence[float]) -> Claim:
    """Return the claim that the mean of the values does not exceed the bar."""
    return Claim(name=name, bar=f"≤ {bar:g}", **_measured(values), holds=fmean(values) <= bar)


def _measured(values: Sequence[float]) -> dict[str, str]:
    return {"value": f"{fmean(values):.3f}", "spread": median_and_range(values)[1]}


def list_scores(name: str, runs: Sequence[Scores]) -> Listing:
    """Return the mean scores of every model of an experiment, and of real pictures."""
    rows = []
    for model in runs[0]:
        values = [
            fmean(score(run[model]) for run in runs) for score in (frechet_distance, kernel_distance, recall, category)
        ]
        copies = fmean(run[model]["copies"]["share"] for run in runs)
        rows.append((model, f"{values[0]:.1f}", f"{values[1]:.3f}", *(f"{v:.3f}" for v in values[2:]), f"{copies:.3f}"))
    real = [run[OURS] for run in runs]
    space = [scores["spaces"]["efficientnet_lite0"]["floor"] for scores in real]
    text = [scores["text"] for scores in real]
    rows.append(
        (
            "real pictures",
            f"{fmean(floor['fd'] for floor in space):.1f}",
            f"{fmean(floor['kid'] for floor in space):.3f}",
            f"{fmean(scores['recall_real'] for scores in text):.3f}",
            f"{fmean(scores['class_accuracy_real'] for scores in text):.3f}",
            "",
        )
    )
    columns = ("model", "Fréchet distance", "kernel distance", "caption found", "class right", "near copies")
    return Listing(title=f"{name}: samples of held-out captions", columns=columns, rows=rows)


if __name__ == "__main__":
    main()
