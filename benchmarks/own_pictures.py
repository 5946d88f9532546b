"""A folder of own pictures: what `ddm run` fits to it beside the plain defaults (`make bench-own-pictures`).

Each folder is trained on twice, through the command line: with `budget_minutes` and with `budget_minutes=0`, which
keeps the defaults that fit any data. Runs that were stopped go on.
"""

import argparse
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.record import RESULTS, Claim, Listing, write_result
from ddm_core.artifacts import read_manifest, to_json
from ensemble.evaluation.reference import extract_rows
from ensemble.evaluation.scoring import Reference
from ensemble.evaluation.spaces import RANKED_SPACE
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage_configs import evaluation_config
from orchestrator.reporting.results import load_score_rows
from orchestrator.run.run_folder import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Scores of a run on own pictures, in the feature space that ranks."""

    pictures: int
    """Those that were trained on."""
    kid: float
    codec_kid: float
    """The distance of held-out pictures that went through the codec alone."""
    nearest_ratio: float
    """Mean distance of a sample to its nearest training picture, over that of a held-out picture."""
    copies: float
    """Share of the samples nearer to the training pictures than a hundredth of the held-out ones."""
    minutes: float
    """Of all stages, one after the other."""


def main() -> None:
    """Train on every folder twice, and write docs/benchmarks/own_pictures.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="+", help="folders of pictures")
    parser.add_argument("--minutes", type=float, default=15, help="the time budget of the fitted runs")
    parser.add_argument("--folder", type=Path, default=Path("runs/own_pictures"), help="of the runs")
    arguments = parser.parse_args()
    claims, rows, seconds = list[Claim](), list[tuple[str, ...]](), 0.0
    for pictures in arguments.pictures:
        outcomes = {}
        for name, minutes in (("fitted", arguments.minutes), ("plain", 0.0)):
            run = run_pictures(pictures, arguments.folder / f"{pictures.name}-{name}", minutes)
            outcomes[name] = outcome = read_outcome(run)
            rows.append((pictures.name, name, *cells(outcome)))
            seconds += 60 * outcome.minutes
        keep_grid(arguments.folder / f"{pictures.name}-fitted", pictures.name)
        claims += make_claims(pictures.name, outcomes["fitted"], outcomes["plain"])
    columns = ("pictures", "settings", "trained on", "KID", "codec's KID", "nearest", "near copies", "minutes")
    notes = [
        "KID in EfficientNet features; one seed. Plain: `budget_minutes=0`, the settings that fit any data. Held-out "
        "pictures are a tenth, too few to rank settings that are close.",
        f"Minutes are those of all stages on a busy machine; {arguments.minutes:g} were asked for.",
    ]
    listing = Listing(title="Own pictures", columns=columns, rows=rows)
    print(to_json(write_result("own_pictures", seconds, claims, [listing], notes)["claims"]))


def run_pictures(pictures: Path, folder: Path, minutes: float) -> RunFolder:
    """Train on a folder of pictures as a user would, or go on."""
    words = ("data=image_folder", f"data.path={pictures.resolve()}", f"folder={folder}", f"budget_minutes={minutes:g}")
    subprocess.run([sys.executable, "-m", "orchestrator", "run", *words, "wandb.mode=disabled"], check=True)
    return RunFolder(folder)


def read_outcome(run: RunFolder) -> Outcome:
    """Return the scores of the default selection."""
    config = run.load_config()
    graph = build_graph(config)
    row = next(row for row in load_score_rows(run, graph) if row.is_default)
    stages = {stage.name: run.artifact(stage) for stage in graph}
    images = np.load(stages[f"score_{row.name}"] / "images.npy", allow_pickle=False)
    reference = Reference.load(stages["reference"], evaluation_config(config))
    samples, held_out = reference.copy_distances(extract_rows(None, images))
    space = row.scores["spaces"][RANKED_SPACE]
    return Outcome(
        pictures=len(np.load(stages["reference"] / "neighbours.npy", mmap_mode="r", allow_pickle=False)),
        kid=space["kid"],
        codec_kid=space["codec"]["kid"],
        nearest_ratio=float(samples.mean() / held_out.mean()),
        copies=row.scores["copies"]["share"],
        minutes=sum(read_manifest(folder).seconds for folder in stages.values()) / 60,
    )


def keep_grid(folder: Path, name: str) -> None:
    """Copy the grid of samples of a run beside the results."""
    run = RunFolder(folder)
    stage = next(stage for stage in build_graph(run.load_config()) if stage.kind == "score")
    shutil.copyfile(run.artifact(stage) / "grid.png", RESULTS / f"own_pictures-{name}.png")


def cells(outcome: Outcome) -> tuple[str, ...]:
    """Return the cells of one run's row."""
    return (
        f"{outcome.pictures:,}",
        f"{outcome.kid:.3f}",
        f"{outcome.codec_kid:.3f}",
        f"{outcome.nearest_ratio:.2f}",
        f"{outcome.copies:.1%}",
        f"{outcome.minutes:.1f}",
    )


def make_claims(name: str, fitted: Outcome, plain: Outcome) -> tuple[Claim, Claim]:
    """Return the claims about one folder."""
    ratio = fitted.kid / plain.kid
    return (
        Claim(
            name=f"{name}: KID over that of the plain defaults",
            bar="≤ 0.5",
            value=f"{ratio:.3f}",
            spread="one seed",
            holds=ratio <= 0.5,
        ),
        Claim(
            name=f"{name}: distance of samples to the nearest training picture, over that of held-out pictures",
            bar="≥ 0.7",
            value=f"{fitted.nearest_ratio:.2f}",
            spread="one seed",
            holds=fitted.nearest_ratio >= 0.7,
        ),
    )


if __name__ == "__main__":
    main()
