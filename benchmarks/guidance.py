"""Does guidance on an interval, or away from a weak model, beat plain guidance at equal calls? (`make bench-guidance`)

One ensemble on garments with captions, as `experiment=demo` trains it. Every way to guide has the same number of
network calls an image; its scale is chosen on sampling seeds that are not measured.
"""

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.arms.finished_run import SPACES, FinishedRun
from benchmarks.record import Claim, Listing, write_result
from ddm_core.artifacts import to_jsonable
from ensemble.evaluation.held_out_prompts import load_held_out_conditions
from ensemble.evaluation.scoring import Reference
from ensemble.evaluation.spaces import PIXELS, RANKED_SPACE
from ensemble.evaluation.text_scores import compare_prompts
from ensemble.pipelines.diffusion_pipeline import EnsembleDiffusionPipeline
from ensemble.sampling.images import to_bytes
from orchestrator.pipeline.stage_configs import evaluation_config

IMAGES, CALLS = 1000, 48
TUNING_SEED, SEEDS = 0, (1, 2, 3)
SCALES = (1.5, 2.0, 3.0, 4.0)
EARLY_STEPS = 250
"""Training steps of the weak experts; those of the demo have 2,000."""
INTERVAL = (0.15, 0.65)
"""Half of the equal steps in t are in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A way to guide: its steps have `CALLS` network calls together."""

    steps: int
    arguments: Mapping[str, Any]
    scales: tuple[float, ...] = SCALES


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The pipeline and what its samples are compared with."""

    folder: Path
    reference: Reference
    pipeline: Any

    def score(self, way: Way, scale: float, seed: int) -> dict[str, float]:
        """Return the Fréchet distance in every space, how well prompts are followed, and the calls an image."""
        prompts = load_held_out_conditions(self.reference.folder, IMAGES, self.folder)
        output = self.pipeline(
            list(prompts.captions),
            seeds=range(seed * IMAGES, (seed + 1) * IMAGES),
            num_inference_steps=way.steps,
            guidance_scale=scale,
            selection="sticky",
            output_type="pt",
            **way.arguments,
        )
        features = self.reference.extract(to_bytes(output.images.permute(0, 2, 3, 1))).spaces
        text = compare_prompts(self.reference.folder, self.folder, prompts, features, self.reference.config)
        calls = output.call_counts
        weak = 0.0 if calls.weak is None else sum(calls.weak.experts.values())
        return {
            **{space: self.reference.compare_space(space, features[space]).fd for space in SPACES},
            "recall": float("nan") if text is None else text.recall,
            "kind": float("nan") if text is None else text.class_accuracy or 0.0,
            "calls": (sum(calls.experts.values()) + weak) / IMAGES,
        }


def main() -> None:
    """Train what is missing, measure, write docs/benchmarks/guidance.json and print its claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="run folder of the demo")
    folder = parser.parse_args().folder
    started = time.monotonic()
    overrides = ("experiment=demo", f"folder={folder}", "wandb.mode=disabled", f"scores.num_samples={IMAGES}")
    run = FinishedRun.complete("demo", overrides)
    early = FinishedRun.complete("early", (*overrides, "monolith=false", f"expert.training.steps={EARLY_STEPS}"))
    bench = Bench(
        folder=run.artifact_folder("ensemble"),
        reference=Reference.load(run.artifact_folder("reference"), evaluation_config(run.config)),
        pipeline=_load(run, "ensemble"),
    )
    ways = {
        "plain": Way(steps=CALLS // 2, arguments={}),
        "interval": Way(steps=CALLS * 2 // 3, arguments={"guidance_interval": INTERVAL}),
        "autoguidance, early experts": Way(steps=CALLS // 2, arguments={"weak": _load(early, "ensemble")}),
        "autoguidance, monolith": Way(steps=CALLS // 2, arguments={"weak": _load(run, "monolith_ensemble")}),
        "none": Way(steps=CALLS, arguments={}, scales=(1.0,)),
    }
    tuned, measured = {}, {}
    for name, way in ways.items():
        trials = {scale: bench.score(way, scale, TUNING_SEED) for scale in way.scales}
        print(name, json.dumps(trials), flush=True)
        tuned[name] = min(trials, key=lambda scale, trials=trials: prod(trials[scale][space] for space in SPACES))
        measured[name] = [bench.score(way, tuned[name], seed) for seed in SEEDS]
        print(name, tuned[name], json.dumps(measured[name]), flush=True)
    claims = [_claim(name, measured) for name in ways if name not in ("plain", "none")]
    result = write_result("guidance", time.monotonic() - started, claims, [_table(ways, tuned, measured)], NOTES)
    print(json.dumps(to_jsonable(result["claims"]), indent=1))


NOTES = (
    f"{IMAGES:,} images a seed, sticky, Euler, prompts of held-out pictures. Scales are the best of "
    f"{', '.join(map(str, SCALES))} on another seed, by the product of both distances.",
    f"Early experts have the recipe of the others and {EARLY_STEPS} steps. CIFAR-10 was not measured: it is not on "
    "the machine, which has no network.",
)


def _load(run: FinishedRun, stage: str) -> Any:
    pipeline = EnsembleDiffusionPipeline.from_pretrained(run.artifact_folder(stage))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _claim(name: str, measured: Mapping[str, list[dict[str, float]]]) -> Claim:
    gains = {
        space: [plain[space] - other[space] for plain, other in zip(measured["plain"], measured[name], strict=True)]
        for space in (RANKED_SPACE, PIXELS)
    }
    return Claim(
        name=f"{name} against plain guidance at {CALLS} calls: Fréchet distance",
        bar="lower in both spaces, every seed",
        value=", ".join(f"{-mean(gain):+.1f} in {space}" for space, gain in gains.items()),
        spread="; ".join(f"{-max(gain):+.1f} to {-min(gain):+.1f}" for gain in gains.values()) + f", n = {len(SEEDS)}",
        holds=all(min(gain) > 0 for gain in gains.values()),
    )


def _table(
    ways: Mapping[str, Way], tuned: Mapping[str, float], measured: Mapping[str, list[dict[str, float]]]
) -> Listing:
    rows = []
    for name, way in ways.items():
        means = {key: float(np.mean([scores[key] for scores in measured[name]])) for key in measured[name][0]}
        rows.append(
            (
                name,
                f"{tuned[name]:g}",
                str(way.steps),
                f"{means['calls']:.0f}",
                *(f"{means[space]:.1f}" for space in (RANKED_SPACE, PIXELS)),
                f"{means['recall']:.2f}",
                f"{means['kind']:.2f}",
            )
        )
    columns = (
        "guidance",
        "scale",
        "steps",
        "calls",
        f"FD, {RANKED_SPACE}",
        "FD, pixels",
        "caption found",
        "kind right",
    )
    return Listing(title=f"Means of {len(SEEDS)} sampling seeds", columns=columns, rows=rows)


if __name__ == "__main__":
    main()
