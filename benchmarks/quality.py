"""The decomposition against its baselines at equal FLOPs (`make bench-quality`): every claim.

All of Fashion-MNIST, several seeds; `benchmarks/arms/quality.py` defines the training. A claim on a distance must hold
in EfficientNet features, the only ones that rank; pixels are shown beside them. Its value is the mean over the seeds of
the ratio to the baseline with the same seed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.arms.finished_run import SPACES, Scores
from benchmarks.arms.quality import ARMS, Arm, run_arm, score_blind_router, score_without_expert
from benchmarks.record import Claim, Listing, write_result
from ddm_core.artifacts import read_json, to_jsonable
from ensemble.evaluation.spaces import RANKED_SPACE

MAIN, DEFAULT_SELECTION = "K = 8", "sticky"
MAX_CALLS = 1.25
"""Most expert calls per step of a cheap selection."""
BASELINES = ("monolith", "cluster_conditioned", "distilled_monolith", "one missing")
"""Rows of the main arm that are not selections."""
OURS, MONOLITH, CLUSTER_CONDITIONED, STUDENT, ONE_MISSING = (
    f"{MAIN}: {name}" for name in (DEFAULT_SELECTION, *BASELINES)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedResults:
    """All measurements with one seed."""

    rows: dict[str, Scores]
    """Scores by `<arm>: <row>`."""
    accuracy: dict[str, float]
    """Class accuracy of the guided rows."""
    router: dict[str, float]
    """Accuracy of the routers over all t, by arm."""
    flops: dict[str, float]
    """Training FLOPs by purpose."""
    largest_share: float
    """Share of the training images in the largest cluster of the unbalanced arm."""


def main() -> None:
    """Run all seeds, write docs/benchmarks/quality.json and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-quality"), help="finished stages are kept here")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for a larger setting, such as compute.cpus=8")
    options = parser.parse_args()
    started = time.monotonic()
    seeds = [run_seed(seed, options.folder, options.overrides) for seed in range(options.seeds)]
    result = write_result(
        "quality", time.monotonic() - started, list(all_claims(seeds)), [*all_listings(seeds)], [note(len(seeds))]
    )
    print(json.dumps(to_jsonable(result["claims"]), indent=1))


def run_seed(seed: int, folder: Path, overrides: Sequence[str]) -> SeedResults:
    """Complete every arm and collect its measurements."""
    arms: dict[str, Arm] = {}
    for name in ARMS:
        arms[name] = run_arm(name, seed, folder, overrides)
        print(f"seed {seed}: {name}", flush=True)
    rows = {f"{name}: {row}": scores for name, arm in arms.items() for row, scores in arm.load_scores().items()}
    rows[ONE_MISSING] = score_without_expert(arms[MAIN])
    guided = arms["guided"]
    accuracy = {
        f"guided: {row}": guided.measure_class_accuracy(guided.artifact_folder(f"score_{row}") / "images.npy")
        for row in guided.load_scores()
    }
    for row, (scores, class_accuracy) in score_blind_router(arms["guided, blind router"]).items():
        rows[f"blind: {row}"], accuracy[f"blind: {row}"] = scores, class_accuracy
    return SeedResults(
        rows={name: scores for name, scores in rows.items() if not name.startswith("guided, blind router")},
        accuracy=accuracy,
        router={name: mean_router_accuracy(arm) for name, arm in arms.items() if "router" in arm.stages},
        flops=training_flops(arms),
        largest_share=max(read_json(arms["unbalanced"].artifact_folder("partition") / "balance.json")["shares"]),
    )


def mean_router_accuracy(arm: Arm) -> float:
    """Return the router's accuracy, averaged over the bins of t."""
    return statistics.mean(float(t_bin["accuracy"]) for t_bin in arm.load_router_quality()["bins"])


def training_flops(arms: dict[str, Arm]) -> dict[str, float]:
    """Return FLOPs of training and clustering by purpose; features and router are counted."""
    kinds = ("features", "partition", "expert", "router")
    main_arm = arms[MAIN]
    return {
        "ours": main_arm.sum_flops(*kinds),
        "experts": main_arm.sum_flops("expert"),
        "router": main_arm.sum_flops("router"),
        "router x 4": arms["router x 4"].sum_flops("router"),
        "clustering": main_arm.sum_flops("features", "partition"),
        "half": arms["K = 8, half the steps"].sum_flops(*kinds),
        "monolith": main_arm.sum_flops("monolith"),
        "cluster_conditioned": main_arm.sum_flops("cluster_conditioned"),
        "distilled_monolith": main_arm.sum_flops("distilled_monolith"),
        "long monolith": arms["monolith at the FLOPs of experts and student"].sum_flops("expert"),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Distances of one row over those of a baseline row, for every seed."""

    name: str
    fd: dict[str, list[float]]
    """Ratios of the Fréchet distance, by space."""
    kid: list[float]
    """Ratios of KID, in the space that ranks."""

    @classmethod
    def between(cls, seeds: Sequence[SeedResults], row: str, baseline: str) -> "Ratio":
        """Compute the ratios of `row` over `baseline`."""

        def ratios(space: str, key: str) -> list[float]:
            return [_score(seed, row, space, key) / _score(seed, baseline, space, key) for seed in seeds]

        return cls(name=row, fd={space: ratios(space, "fd") for space in SPACES}, kid=ratios(RANKED_SPACE, "kid"))

    @property
    def ranked_mean(self) -> float:
        """Return the mean over the seeds, in the space that ranks."""
        return statistics.mean(self.fd[RANKED_SPACE])

    def is_kid_lower(self) -> bool:
        """Return whether KID falls, too."""
        return statistics.mean(self.kid) < 1

    def claim(self, name: str, target: float, remark: str = "", *, also_holds: bool = True) -> Claim:
        """Return the claim that the ratio is at most `target` in the space that ranks."""
        value = ", ".join(f"{statistics.mean(ratios):.3f} ({space})" for space, ratios in self.fd.items())
        return Claim(
            name=name,
            bar=f"≤ {target:.2f} in {RANKED_SPACE}",
            value=f"{value}; KID {statistics.mean(self.kid):.2f}{remark}",
            spread=", ".join(f"{min(ratios):.3f} to {max(ratios):.3f}" for ratios in self.fd.values()),
            holds=self.ranked_mean <= target and also_holds,
        )


def _score(seed: SeedResults, row: str, space: str, key: str) -> float:
    return float(seed.rows[row]["spaces"][space][key])


def best_ratio(seeds: Sequence[SeedResults]) -> Ratio:
    """Return the ratio to the monolith that is lowest in the space that ranks.

    The candidates are feature clusters with every K and selection that makes few calls.
    """
    names = [f"K = {k}: {DEFAULT_SELECTION}" for k in (2, 4, 16)]
    names += [name for name in seeds[0].rows if name.startswith(f"{MAIN}: ") and not name.endswith(BASELINES)]
    cheap = [
        name
        for name in names
        if mean_over_seeds(seeds, lambda seed, n=name: seed.rows[n]["calls_per_step"]) <= MAX_CALLS
    ]
    return min((Ratio.between(seeds, name, MONOLITH) for name in cheap), key=lambda ratio: ratio.ranked_mean)


def mean_over_seeds(seeds: Sequence[SeedResults], value: Callable[[SeedResults], float]) -> float:
    """Return the mean of a number over the seeds."""
    return statistics.mean(map(value, seeds))


def all_claims(seeds: Sequence[SeedResults]) -> Iterator[Claim]:
    """Yield one claim per target of the project."""
    best = best_ratio(seeds)
    yield best.claim(
        f"best selection and K ({best.name}) against the FLOP-matched monolith", 0.75, also_holds=best.is_kid_lower()
    )
    half = Ratio.between(seeds, f"K = 8, half the steps: {DEFAULT_SELECTION}", MONOLITH)
    yield half.claim("the same at half of the experts' steps", 1.0, f"; {flops_ratio(seeds, 'half')} of its FLOPs")
    conditioned = min(
        (Ratio.between(seeds, name, CLUSTER_CONDITIONED) for name in {OURS, best.name}),
        key=lambda ratio: ratio.ranked_mean,
    )
    yield conditioned.claim("the same against the cluster-conditioned monolith", 0.90)
    yield every_seed_claim(
        "expert calls per step of the default selection",
        f"≤ {MAX_CALLS}",
        [seed.rows[OURS]["calls_per_step"] for seed in seeds],
        lambda value: value <= MAX_CALLS,
    )
    yield from partition_claims(seeds)
    yield from router_claims(seeds)
    student = Ratio.between(seeds, STUDENT, MONOLITH)
    yield student.claim("student of the experts against the monolith, cost of the experts not counted", 1.0)
    long_monolith = f"monolith at the FLOPs of experts and student: {DEFAULT_SELECTION}"
    yield Ratio.between(seeds, STUDENT, long_monolith).claim(
        "the same, cost of the experts counted",
        1.0,
        f"; {flops_ratio(seeds, 'long monolith')} of the monolith's FLOPs",
    )
    yield missing_expert_claim(seeds)
    mixed = Ratio.between(seeds, f"K = 8, mixed: {DEFAULT_SELECTION}", OURS)
    yield mixed.claim("four velocity and four noise experts against all velocity", 1.03)
    yield every_seed_claim(
        "training FLOPs of the ensemble over the monolith's, router and clustering counted",
        "1.00 ± 0.01",
        [seed.flops["ours"] / seed.flops["monolith"] for seed in seeds],
        lambda value: abs(value - 1) <= 0.01,
    )


def flops_ratio(seeds: Sequence[SeedResults], name: str) -> str:
    """Return the FLOPs over the monolith's, as text."""
    return f"{mean_over_seeds(seeds, lambda seed: seed.flops[name] / seed.flops['monolith']):.2f}"


def every_seed_claim(name: str, target: str, values: Sequence[float], holds: Callable[[float], bool]) -> Claim:
    """Return a claim on one number per seed that every seed must meet."""
    return Claim(
        name=name,
        bar=target,
        value=f"{statistics.mean(values):.4f}",
        spread=f"{min(values):.4f} to {max(values):.4f}",
        holds=all(map(holds, values)),
    )


def partition_claims(seeds: Sequence[SeedResults]) -> Iterator[Claim]:
    """Yield the claims that depend on the partition."""
    row = f"unbalanced: {DEFAULT_SELECTION}"
    largest = seeds[0].largest_share
    floor = seeds[0].rows[row]["cluster_share_tv_floor"]
    yield every_seed_claim(
        f"total variation of cluster shares, largest cluster {100 * largest:.0f} % (real images: {floor:.3f})",
        "≤ 0.02, cluster ≥ 40 %",
        [seed.rows[row]["cluster_share_tv"] for seed in seeds],
        lambda value: value <= 0.02 and largest >= 0.4,
    )
    random_clusters = Ratio.between(seeds, OURS, f"K = 8, random clusters: {DEFAULT_SELECTION}")
    yield random_clusters.claim("feature clusters against random clusters", 1.0)
    sixteen = Ratio.between(seeds, f"K = 16: {DEFAULT_SELECTION}", MONOLITH)
    yield sixteen.claim("K = 16 at the same global batch against the monolith", 1.0)


def router_claims(seeds: Sequence[SeedResults]) -> Iterator[Claim]:
    """Yield the claims that depend on the router."""
    shares = [seed.flops["router"] / seed.flops["experts"] for seed in seeds]
    factor = mean_over_seeds(seeds, lambda seed: seed.flops["router x 4"] / seed.flops["router"])
    gaps = [100 * (seed.router["router x 4"] - seed.router[MAIN]) for seed in seeds]
    yield Claim(
        name="router's training FLOPs over the experts', and accuracy gain of a router with more FLOPs",
        bar="≤ 3 %, within 1 point of 4 ×",
        value=f"{100 * statistics.mean(shares):.2f} %, {statistics.mean(gaps):+.2f} points at {factor:.1f} ×",
        spread=f"{min(gaps):+.2f} to {max(gaps):+.2f} points",
        holds=max(shares) <= 0.03 and statistics.mean(gaps) <= 1,
    )
    conditional = Ratio.between(seeds, "guided: top_k_1", "blind: top_k_1")
    accuracy, blind_accuracy = (
        mean_over_seeds(seeds, lambda seed, n=name: seed.accuracy[n]) for name in ("guided: top_k_1", "blind: top_k_1")
    )
    yield conditional.claim(
        "class-conditional router against an unconditional router, top-1, guidance 2",
        1.0,
        f"; class accuracy {accuracy:.3f} against {blind_accuracy:.3f}",
        also_holds=accuracy >= blind_accuracy,
    )


def missing_expert_claim(seeds: Sequence[SeedResults]) -> Claim:
    """Return the claim that the loss of an expert costs content, not precision."""
    missing = Ratio.between(seeds, ONE_MISSING, OURS)
    precision = mean_over_seeds(seeds, lambda seed: _precision(seed, ONE_MISSING) / _precision(seed, OURS))
    distances = ", ".join(f"{statistics.mean(ratios):.2f}" for ratios in missing.fd.values())
    return Claim(
        name="loss of one of eight experts: precision over that of all eight",
        bar="≥ 0.95, distances reported",
        value=f"{precision:.3f}; FD {distances} ×",
        spread=", ".join(f"FD {min(ratios):.2f} to {max(ratios):.2f}" for ratios in missing.fd.values()),
        holds=precision >= 0.95,
    )


def _precision(seed: SeedResults, row: str) -> float:
    return _score(seed, row, RANKED_SPACE, "precision")


def all_listings(seeds: Sequence[SeedResults]) -> Iterator[Listing]:
    """Yield one table per space, the table of space-independent scores, FLOPs and routers."""
    for space in SPACES:
        yield distance_listing(seeds, space)
    yield coverage_listing(seeds)
    yield Listing(
        title="Training FLOPs over the monolith's",
        columns=("training", "FLOPs ratio"),
        rows=[(name, flops_ratio(seeds, name)) for name in seeds[0].flops],
    )
    yield Listing(
        title="Routers: accuracy over all t",
        columns=("arm", "accuracy"),
        rows=[(name, format_mean([seed.router[name] for seed in seeds])) for name in seeds[0].router],
    )


def distance_listing(seeds: Sequence[SeedResults], space: str) -> Listing:
    """Return Fréchet distance, KID, precision and recall of every row in one space."""
    is_ranked, rows = space == RANKED_SPACE, []
    share_names = ("precision", "recall") if is_ranked else ()
    for name in seeds[0].rows:
        baseline = "guided: monolith" if name.startswith(("guided", "blind")) else MONOLITH
        ratio = Ratio.between(seeds, name, baseline)
        columns = [("fd", 1, ratio.fd[space]), *([("kid", 1000, ratio.kid)] if is_ranked else [])]
        distances = [
            f"{format_mean([scale * _score(seed, name, space, key) for seed in seeds])} ({statistics.mean(ratios):.2f})"
            for key, scale, ratios in columns
        ]
        shares = [format_mean([_score(seed, name, space, key) for seed in seeds]) for key in share_names]
        rows.append((name, *distances, *shares))
    scores = seeds[0].rows[MONOLITH]["spaces"][space]
    for role in ("codec", "floor"):
        values = {"fd": scores[role]["fd"], **({"kid": 1000 * scores[role]["kid"]} if is_ranked else {})}
        values |= {name: scores[role][name] for name in share_names}
        rows.append((f"*{role}*", *(f"{value:.3f}" for value in values.values())))
    return Listing(
        title=f"Feature space {space}",
        columns=("arm: row", "FD (over monolith)", *(["KID ×1000 (over monolith)", *share_names] if is_ranked else [])),
        rows=rows,
    )


def coverage_listing(seeds: Sequence[SeedResults]) -> Listing:
    """Return the scores that do not depend on a feature space: coverage, shares and cost."""
    keys = ("class_coverage", "class_tv", "cluster_share_tv", "calls_per_step")
    rows = []
    for name in seeds[0].rows:
        accuracies = [seed.accuracy[name] for seed in seeds if name in seed.accuracy]
        cells = [format_mean([seed.rows[name][key] for seed in seeds]) for key in keys]
        rows.append((name, *cells, format_mean(accuracies) if accuracies else ""))
    columns = (
        "arm: row",
        "class coverage",
        "class TV",
        "cluster share TV",
        "expert calls per step",
        "class accuracy",
    )
    return Listing(title="Coverage, shares and cost", columns=columns, rows=rows)


def format_mean(values: Sequence[float]) -> str:
    """Return mean ± standard deviation as text."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def note(num_seeds: int) -> str:
    """Return the note below the tables."""
    return (
        f"Mean over {num_seeds} seeds ± standard deviation. The number in brackets is the mean ratio to the monolith "
        "with the same seed (for guided rows: to the guided monolith). Codec, partitions and the seeds of the samples "
        "are the same for all rows. A floor is the score of the same number of real training images. Rows that are not "
        "guided are unconditional samples. Unbalanced means three clusters of pixels without a balance constraint."
    )


if __name__ == "__main__":
    main()
