"""Ensemble against FLOP-matched monolith, every selection, several seeds (`make bench-quality`).

Every seed is one whole run of the demo: its own partition, experts, router, monolith and unconditional samples. The
only bar is that the table is complete; what it says is whatever it says.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from artifacts import plain
from benchmarks.record import Claim, Listing, write_result
from orchestrator.compose import compose
from orchestrator.config import parse_config
from orchestrator.controller import run_pipeline
from orchestrator.graph import build_graph
from orchestrator.results import score_rows, training_flops
from orchestrator.run_folder import RunFolder

SPACES = ("pixels", "efficientnet_lite0")
Rows = dict[str, list[dict[str, Any]]]
"""Scores of every seed, by the row's name."""


def main() -> None:
    """Run all seeds, write docs/benchmarks/quality.json and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-quality"), help="finished runs are kept here")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for a larger setting, such as data=fashion_full")
    options = parser.parse_args()
    started = time.monotonic()
    rows: Rows = {}
    flops = []
    for seed in range(options.seeds):
        scores, ratio = run_seed(seed, options.folder / f"seed_{seed}", options.overrides)
        flops.append(ratio)
        for name, found in scores.items():
            rows.setdefault(name, []).append(found)
    report(rows, flops, options.seeds, time.monotonic() - started)


def run_seed(seed: int, folder: Path, overrides: list[str]) -> tuple[dict[str, dict[str, Any]], float]:
    """Scores by row, and our training FLOPs over the monolith's."""
    spaces = f"scores.spaces=[{','.join(SPACES)}]"
    own = [f"seed={seed}", f"folder={folder}", spaces, "scores.conditional=false", "wandb.mode=disabled", *overrides]
    config = parse_config(compose(["experiment=demo", *own]))
    run_pipeline(config, Console())
    run, graph = RunFolder(folder), build_graph(config)
    flops = training_flops(run, graph)
    ours = sum(value for name, value in flops.items() if name != "monolith")
    return {row.name: row.scores for row in score_rows(run, graph)}, ours / flops["monolith"]


def report(rows: Rows, flops: list[float], seeds: int, seconds: float) -> None:
    """Write the table and print it."""
    complete = all(len(found) == seeds for found in rows.values())
    claims = [
        Claim(
            name="every selection and the monolith scored with every seed",
            bar=f"{seeds} seeds each",
            value=f"{len(rows)} rows",
            spread=f"{min(map(len, rows.values()))} to {max(map(len, rows.values()))} seeds",
            holds=complete,
        ),
        Claim(
            name="training FLOPs of our side over the monolith's, router and clustering counted",
            bar="1.00 ± 0.01",
            value=f"{statistics.mean(flops):.4f}",
            spread=f"{min(flops):.4f} to {max(flops):.4f}",
            holds=all(abs(ratio - 1) <= 0.01 for ratio in flops),
        ),
    ]
    listings = [distances(rows, space) for space in rows["monolith"][0]["spaces"]]
    notes = [
        "Mean over the seeds ± their standard deviation. The second number of a distance is its ratio to the "
        "monolith with the same seed. A floor is the score of as many real training images.",
    ]
    print(json.dumps(plain(write_result("quality", seconds, claims, [*listings, shares(rows)], notes)), indent=1))


def distances(rows: Rows, space: str) -> Listing:
    """Fréchet distance, KID, precision and recall of every row in one space."""
    base = [found["spaces"][space] for found in rows["monolith"]]
    lines = []
    for name, found in rows.items():
        scores = [one["spaces"][space] for one in found]
        cells = [
            f"{spread(scores, key, scale)} ({ratio(scores, base, key)})" for key, scale in (("fd", 1), ("kid", 1000))
        ]
        lines.append((name, *cells, spread(scores, "precision"), spread(scores, "recall")))
    floors = [spread(base, f"{key}_floor", scale) for key, scale in (("fd", 1), ("kid", 1000))]
    lines.append(("*floor*", *floors, spread(base, "precision_floor"), spread(base, "recall_floor")))
    return Listing(
        title=f"In the space {space}",
        columns=("", "FD (to mono)", "KID ×1000 (to mono)", "precision", "recall"),
        rows=lines,
    )


def shares(rows: Rows) -> Listing:
    """What is the same in every space: coverage, shares, memorising, cost."""
    keys = ("class_coverage", "class_tv", "cluster_share_tv", "nn_ratio", "calls_per_step")
    lines = [(name, *(spread(found, key) for key in keys)) for name, found in rows.items()]
    columns = ("", "class coverage", "class TV", "cluster share TV", "NN ratio", "expert calls a step")
    return Listing(title="Coverage, shares, memorising and cost", columns=columns, rows=lines)


def spread(scores: list[dict[str, Any]], key: str, scale: float = 1.0) -> str:
    """Mean ± standard deviation."""
    values = [scale * score[key] for score in scores]
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def ratio(scores: list[dict[str, Any]], base: list[dict[str, Any]], key: str) -> str:
    """Mean ratio to the monolith of the same seed."""
    return f"{statistics.mean(ours[key] / theirs[key] for ours, theirs in zip(scores, base, strict=True)):.2f}"


if __name__ == "__main__":
    main()
