"""Do velocity and noise experts mix? (`make bench-mixed`) Garments, half of four experts predict the noise.

Every mixed arm shares its velocity experts with the one where all predict the velocity. HDDM (arXiv:2603.06741) mixes
experts of different noise schedules, converted at equal noise-to-signal ratio; it reports .95 of one objective.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.arms.finished_run import SPACES, Scores
from benchmarks.arms.quality import Arm
from benchmarks.record import Claim, Listing, write_result
from ddm_core.artifacts import to_jsonable
from ensemble.evaluation.spaces import RANKED_SPACE

EXPERTS, NOISE_EXPERTS, TARGET = 4, (2, 3), 1.03
BASE = (
    "data=fashion",
    "codec=pca",
    "partition.features=random_conv",
    "partition.num_fine=64",
    f"partition.num_experts={EXPERTS}",
    "partition.seed=0",
    "expert.network.width=192",
    "expert.network.depth=3",
    "expert.training.steps=1500",
    "expert.training.batch_size=256",
    "expert.training.lr=2e-3",
    "expert.training.condition_dropout=1",
    "router.training.steps=100",
    "ensemble.steps=20",
    f"scores.spaces=[{','.join(SPACES)}]",
    "scores.seed=0",
    "compute=inline",
    "wandb.mode=disabled",
)
"""Samples are sticky, so that the router does not matter."""
VELOCITY, NOISE = "all velocity", "prediction=noise"
SETTINGS: Mapping[str, Sequence[str]] = {
    VELOCITY: (),
    "mixed": (NOISE,),
    "mixed, min-SNR": (NOISE, "loss_weight=min_snr"),
    "mixed, velocity's error": (NOISE, "loss_weight=velocity"),
    "mixed, cosine": (NOISE, "noise_schedule=cosine"),
    "mixed, cosine, velocity's error": (NOISE, "noise_schedule=cosine", "loss_weight=velocity"),
}
"""Settings of the noise experts by arm."""


def main() -> None:
    """Complete all arms, write docs/benchmarks/mixed.json and print its claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-mixed"), help="finished stages are kept here")
    options = parser.parse_args()
    started = time.monotonic()
    scores: dict[str, list[Scores]] = {arm: [] for arm in SETTINGS}
    for seed in range(options.seeds):
        for arm, settings in SETTINGS.items():
            changes = [f"+experts.{k}.{setting}" for k in NOISE_EXPERTS for setting in settings]
            run = Arm.complete(arm, [*BASE, *changes, f"seed={seed}", f"folder={options.folder}"])
            scores[arm].append(run.load_scores()["sticky"]["spaces"])
            print(f"seed {seed}, {arm}: {[scores[arm][-1][space]['fd'] for space in SPACES]}", flush=True)
    claims = [make_claim(arm, scores) for arm in SETTINGS if arm != VELOCITY]
    result = write_result("mixed", time.monotonic() - started, claims, [list_scores(scores)], [note(options.seeds)])
    print(json.dumps(to_jsonable(result["claims"]), indent=1))


def ratios(arm: str, scores: Mapping[str, Sequence[Scores]], space: str) -> list[float]:
    """Return the Fréchet distance over that of all velocity, for every seed."""
    pairs = zip(scores[arm], scores[VELOCITY], strict=True)
    return [float(ours[space]["fd"] / other[space]["fd"]) for ours, other in pairs]


def make_claim(arm: str, scores: Mapping[str, Sequence[Scores]]) -> Claim:
    """Return the bar of a mixed arm."""
    by_space = {space: ratios(arm, scores, space) for space in SPACES}
    return Claim(
        name=f"{arm}: Fréchet distance over all velocity",
        bar=f"≤ {TARGET} in both spaces",
        value=", ".join(f"{fmean(values):.3f} ({space})" for space, values in by_space.items()),
        spread=", ".join(f"{min(values):.3f} to {max(values):.3f}" for values in by_space.values()),
        holds=all(fmean(values) <= TARGET for values in by_space.values()),
    )


def list_scores(scores: Mapping[str, Sequence[Scores]]) -> Listing:
    """Return the mean scores of every arm."""
    keys = [(space, "fd") for space in SPACES] + [(RANKED_SPACE, key) for key in ("kid", "precision", "recall")]
    rows = [
        (arm, *(f"{fmean(one[space][key] for one in seeds):.3f}" for space, key in keys))
        for arm, seeds in scores.items()
    ]
    columns = ("arm", *(f"{key}, {space}" for space, key in keys))
    return Listing(title="Mean scores", columns=columns, rows=rows)


def note(seeds: int) -> str:
    """Return the note below the table."""
    return (
        f"8,000 garments, {EXPERTS} residual MLPs on 96 principal components, {len(NOISE_EXPERTS)} of them predict the "
        f"noise, sticky selection, unconditional, 1,000 samples, {seeds} seeds. Distances decide in both spaces."
    )


if __name__ == "__main__":
    main()
