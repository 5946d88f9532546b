"""Which settings of the trainer are best, and does the held-out loss rank as KID does? (`make bench-recipes`)

One transformer on the garments' latents, in patches of 7 pixels; every arm has the same steps and batches. A setting
that wins in held-out loss and KID over all seeds should be a default.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from scipy.stats import spearmanr

from benchmarks.arms.finished_run import FinishedRun
from benchmarks.record import Claim, Listing, write_result
from ddm_core.artifacts import read_json, read_manifest, to_jsonable
from ensemble.evaluation.spaces import RANKED_SPACE
from experts.training.held_out import HELD_OUT

STEPS, BATCH, SAMPLES = 2000, 32, 500
DEFAULT = "the defaults: AdamW, linear, no shift, width .1"
BASE = (
    "data=fashion",
    "codec=patch_pca",
    "codec.patch_size=7",
    "codec.components=24",
    "expert=dit",
    "expert.network.patch_size=1",
    "expert.network.heads=3",
    "expert.network.depth=3",
    f"expert.training.steps={STEPS}",
    f"expert.training.batch_size={BATCH}",
    "expert.training.lr=2e-3",
    "partition.num_experts=1",
    "partition.features=pixels",
    "router.training.steps=1",
    "ensemble.steps=16",
    f"scores.spaces=[pixels,{RANKED_SPACE}]",
    f"scores.num_samples={SAMPLES}",
    "scores.seed=0",
    "scores.conditional=true",
    "compute=inline",
    "wandb.mode=disabled",
)
ARMS: Mapping[str, Sequence[str]] = {
    DEFAULT: (),
    "Muon": ("expert.training.optimizer=muon",),
    "shift 2": ("expert.training.t_shift=2",),
    "REPA, random_conv": ("expert.align_weight=0.5", "expert.align_teacher=random_conv"),
    "average of width .05": ("expert.training.ema_width=0.05",),
    "average of width .2": ("expert.training.ema_width=0.2",),
    "REPA, EfficientNet": ("expert.align_weight=0.5", "expert.align_teacher=efficientnet_lite0"),
    "min-SNR": ("expert.loss_weight=min_snr",),
    "shift .5": ("expert.training.t_shift=0.5",),
    "cosine": ("expert.training.lr_schedule=cosine",),
    "warm-up, stable, decay": ("expert.training.lr_schedule=warmup_stable_decay",),
}
REPEATED = (DEFAULT, "Muon", "shift .5", "warm-up, stable, decay")
"""Arms of all seeds: those that beat the defaults with the first one, which the others have alone."""
MIN_SPEARMAN = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one training came to."""

    held_out: float
    """Error of the velocity on held-out samples, the mean of eight t."""
    kid: float
    fd: float
    flops: float
    """Of the training."""


def main() -> None:
    """Complete all arms, write docs/benchmarks/recipes.json and print its claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-recipes"), help="finished stages are kept here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    outcomes: dict[str, list[Outcome]] = {arm: [] for arm in ARMS}
    for seed in range(options.seeds):
        for arm in REPEATED if seed else ARMS:
            run = FinishedRun.complete(arm, [*BASE, *ARMS[arm], f"seed={seed}", f"folder={options.folder}"])
            outcomes[arm].append(read_outcome(run))
            print(f"seed {seed}, {arm}: {outcomes[arm][-1]}", flush=True)
    claims = [*(compare(arm, outcomes) for arm in ARMS if arm != DEFAULT), correlate(outcomes)]
    result = write_result("recipes", time.monotonic() - started, claims, [list_outcomes(outcomes)], [NOTE])
    print(json.dumps(to_jsonable(result["claims"]), indent=1))


def read_outcome(run: FinishedRun) -> Outcome:
    """Return the last held-out loss of the expert and the scores of its samples."""
    expert = run.artifact_folder("expert_0")
    rows = [json.loads(line) for line in (expert / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = read_json(run.artifact_folder("score_sticky") / "scores.json")["spaces"][RANKED_SPACE]
    flops = read_manifest(expert).flops
    return Outcome(held_out=rows[-1][HELD_OUT], kid=scores["kid"], fd=scores["fd"], flops=flops)


def compare(arm: str, outcomes: Mapping[str, Sequence[Outcome]]) -> Claim:
    """Return whether the defaults are at least as good as an arm, in held-out loss or KID, over the arm's seeds."""
    pairs = list(zip(outcomes[arm], outcomes[DEFAULT], strict=False))
    losses = [ours.held_out / default.held_out for ours, default in pairs]
    kids = [ours.kid / default.kid for ours, default in pairs]
    wins = max(losses) < 1 and max(kids) < 1
    return Claim(
        name=f"{arm}: held-out loss and KID over those of the defaults",
        bar="not both below 1 with every seed: then it should be the default",
        value=f"{fmean(losses):.3f}, {fmean(kids):.3f}",
        spread=f"{min(losses):.3f} to {max(losses):.3f}, {min(kids):.3f} to {max(kids):.3f}, n = {len(pairs)}",
        holds=not wins,
    )


def correlate(outcomes: Mapping[str, Sequence[Outcome]]) -> Claim:
    """Return the rank correlation of held-out loss and KID over the arms of the first seed."""
    first = [runs[0] for runs in outcomes.values()]
    rank = float(spearmanr([run.held_out for run in first], [run.kid for run in first]).statistic)
    return Claim(
        name=f"held-out loss at eight t against KID, {len(first)} runs: Spearman",
        bar=f"≥ {MIN_SPEARMAN}",
        value=f"{rank:.3f}",
        spread="one seed",
        holds=rank >= MIN_SPEARMAN,
    )


def list_outcomes(outcomes: Mapping[str, Sequence[Outcome]]) -> Listing:
    """Return the means of every arm over its seeds."""
    rows = [
        (
            arm,
            f"{fmean(run.held_out for run in runs):.4f}",
            f"{fmean(run.kid for run in runs):.3f}",
            f"{fmean(run.fd for run in runs):.1f}",
            f"{fmean(run.flops for run in runs) / 1e12:.2f}",
            str(len(runs)),
        )
        for arm, runs in outcomes.items()
    ]
    columns = ("arm", "held-out loss", f"KID, {RANKED_SPACE}", f"FD, {RANKED_SPACE}", "TFLOPs", "seeds")
    return Listing(title="Settings of one transformer", columns=columns, rows=rows)


NOTE = (
    f"7,200 garments, {STEPS} steps of {BATCH}, a DiT of 3 blocks, 96 wide, 16 tokens of 24 numbers; {SAMPLES} samples "
    "of held-out classes in 16 steps. Held-out loss is the unweighted error of the velocity at eight fixed t."
)


if __name__ == "__main__":
    main()
