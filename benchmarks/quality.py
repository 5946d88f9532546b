"""The decomposition against its baselines at equal FLOPs (`make bench-quality`): every claim.

All of Fashion-MNIST, several seeds; `benchmarks/quality_arms.py` says what is trained. A claim about a distance holds
if it holds in *both* feature spaces, by the mean over the seeds of the ratio to the baseline with the same seed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.finished_run import SPACES, Scores
from benchmarks.quality_arms import ARMS, Arm, blind_rows, lost_expert, run_arm
from benchmarks.record import Claim, Listing, write_result
from ddm_core.artifacts import read_json, to_jsonable

MAIN, OURS = "K = 8", "sticky"
MOST_CALLS = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Seed:
    """Everything that was found with one seed."""

    rows: dict[str, Scores]
    """Scores by `<arm>: <row>`."""
    accuracy: dict[str, float]
    """Class accuracy of the guided rows."""
    router: dict[str, float]
    """Accuracy of the routers over all t, by arm."""
    flops: dict[str, float]
    """Training FLOPs by what they were for."""
    largest_share: float
    """Of the training images in the largest cluster of the unbalanced arm."""


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
        "quality", time.monotonic() - started, list(claims(seeds)), [*listings(seeds)], [notes(len(seeds))]
    )
    print(json.dumps(to_jsonable(result["claims"]), indent=1))


def run_seed(seed: int, folder: Path, overrides: Sequence[str]) -> Seed:
    """Bring every arm to its end and collect what it says."""
    arms: dict[str, Arm] = {}
    for name in ARMS:
        arms[name] = run_arm(name, seed, folder, overrides)
        print(f"seed {seed}: {name}", flush=True)
    rows = {f"{name}: {row}": scores for name, arm in arms.items() for row, scores in arm.scores().items()}
    rows[f"{MAIN}: one missing"] = lost_expert(arms[MAIN])
    guided = arms["guided"]
    accuracy = {
        f"guided: {row}": guided.class_accuracy(guided.folder(f"score_{row}") / "images.npy") for row in guided.scores()
    }
    for row, (scores, seen) in blind_rows(arms["guided, blind router"]).items():
        rows[f"blind: {row}"], accuracy[f"blind: {row}"] = scores, seen
    return Seed(
        rows={name: found for name, found in rows.items() if not name.startswith("guided, blind router")},
        accuracy=accuracy,
        router={name: mean_accuracy(arm) for name, arm in arms.items() if "router" in arm.stages},
        flops=training_costs(arms),
        largest_share=max(read_json(arms["unbalanced"].folder("partition") / "balance.json")["shares"]),
    )


def mean_accuracy(arm: Arm) -> float:
    """The router's accuracy, averaged over the bins of t."""
    return statistics.mean(float(found["accuracy"]) for found in arm.quality()["bins"])


def training_costs(arms: dict[str, Arm]) -> dict[str, float]:
    """FLOPs of training and clustering; features and router are counted."""
    ours = ("features", "partition", "expert", "router")
    main_arm = arms[MAIN]
    return {
        "ours": main_arm.flops(*ours),
        "experts": main_arm.flops("expert"),
        "router": main_arm.flops("router"),
        "router x 4": arms["router x 4"].flops("router"),
        "clustering": main_arm.flops("features", "partition"),
        "half": arms["K = 8, half the steps"].flops(*ours),
        "monolith": main_arm.flops("monolith"),
        "cluster_conditioned": main_arm.flops("cluster_conditioned"),
        "distilled_monolith": main_arm.flops("distilled_monolith"),
        "long monolith": arms["monolith at the FLOPs of experts and student"].flops("expert"),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One row over another, with every seed."""

    name: str
    values: dict[str, list[float]]
    """By space, of the Fréchet distance."""
    kid: dict[str, list[float]]

    @classmethod
    def of(cls, seeds: Sequence[Seed], ours: str, theirs: str) -> "Ratio":
        """The row `ours` over the row `theirs`."""
        values, kid = (
            {space: [_at(seed, ours, space, key) / _at(seed, theirs, space, key) for seed in seeds] for space in SPACES}
            for key in ("fd", "kid")
        )
        return cls(name=ours, values=values, kid=kid)

    @property
    def worst(self) -> float:
        """Mean over the seeds, in the space where it is larger."""
        return max(statistics.mean(found) for found in self.values.values())

    def agrees(self) -> bool:
        """Whether KID falls too, in both spaces."""
        return all(statistics.mean(found) < 1 for found in self.kid.values())

    def claim(self, name: str, bar: float, more: str = "", holds: bool = True) -> Claim:
        """That it is at most `bar` in both spaces."""
        value = ", ".join(f"{statistics.mean(found):.3f} ({space})" for space, found in self.values.items())
        kid = ", ".join(f"{statistics.mean(found):.2f}" for found in self.kid.values())
        return Claim(
            name=name,
            bar=f"≤ {bar:.2f} in both",
            value=f"{value}; KID {kid}{more}",
            spread=", ".join(f"{min(found):.3f} to {max(found):.3f}" for found in self.values.values()),
            holds=self.worst <= bar and holds,
        )


def _at(seed: Seed, row: str, space: str, key: str) -> float:
    return float(seed.rows[row]["spaces"][space][key])


def best(seeds: Sequence[Seed]) -> Ratio:
    """Of feature clusters, every K and selection of few calls: the one whose worse space is best."""
    names = [f"K = {k}: {OURS}" for k in (2, 4, 16)]
    names += [name for name in seeds[0].rows if name.startswith(f"{MAIN}: ") and not name.endswith(BASELINES)]
    cheap = [name for name in names if mean(seeds, lambda seed, n=name: seed.rows[n]["calls_per_step"]) <= MOST_CALLS]
    return min((Ratio.of(seeds, name, MONOLITH) for name in cheap), key=lambda ratio: ratio.worst)


MONOLITH, TOLD, STUDENT = (f"{MAIN}: {name}" for name in ("monolith", "cluster_conditioned", "distilled_monolith"))
BASELINES = ("monolith", "cluster_conditioned", "distilled_monolith", "one missing")


def mean(seeds: Sequence[Seed], value: Callable[[Seed], float]) -> float:
    """Mean over the seeds."""
    return statistics.mean(map(value, seeds))


def claims(seeds: Sequence[Seed]) -> Iterator[Claim]:
    """One for each row of the table that the project set itself."""
    ours, top = f"{MAIN}: {OURS}", best(seeds)
    yield top.claim(f"best selection and K ({top.name}) against the FLOP-matched monolith", 0.75, holds=top.agrees())
    half = Ratio.of(seeds, f"K = 8, half the steps: {OURS}", MONOLITH)
    yield half.claim("the same at half of the experts' steps", 1.0, f"; {cost(seeds, 'half')} of its FLOPs")
    told = min((Ratio.of(seeds, name, TOLD) for name in {ours, top.name}), key=lambda ratio: ratio.worst)
    yield told.claim("the same against the monolith that is told the cluster", 0.90)
    yield measured(
        "expert calls per step of the default selection",
        f"≤ {MOST_CALLS}",
        [seed.rows[ours]["calls_per_step"] for seed in seeds],
        lambda value: value <= MOST_CALLS,
    )
    yield from partition_claims(seeds)
    yield from router_claims(seeds)
    student = Ratio.of(seeds, STUDENT, MONOLITH)
    yield student.claim("student from the experts against the monolith, experts' cost not counted", 1.0)
    paid = Ratio.of(seeds, STUDENT, f"monolith at the FLOPs of experts and student: {OURS}")
    yield paid.claim(
        "the same, experts' cost counted", 1.0, f"; {cost(seeds, 'long monolith')} of the monolith's FLOPs"
    )
    yield missing_claim(seeds)
    mixed = Ratio.of(seeds, f"K = 8, mixed: {OURS}", ours)
    yield mixed.claim("four velocity and four noise experts against all velocity", 1.03)
    yield measured(
        "training FLOPs of our side over the monolith's, router and clustering counted",
        "1.00 ± 0.01",
        [seed.flops["ours"] / seed.flops["monolith"] for seed in seeds],
        lambda value: abs(value - 1) <= 0.01,
    )


def cost(seeds: Sequence[Seed], name: str) -> str:
    """FLOPs over the monolith's."""
    return f"{mean(seeds, lambda seed: seed.flops[name] / seed.flops['monolith']):.2f}"


def measured(name: str, bar: str, values: Sequence[float], holds: Callable[[float], bool]) -> Claim:
    """A claim about one number with every seed; all of them must hold."""
    return Claim(
        name=name,
        bar=bar,
        value=f"{statistics.mean(values):.4f}",
        spread=f"{min(values):.4f} to {max(values):.4f}",
        holds=all(map(holds, values)),
    )


def partition_claims(seeds: Sequence[Seed]) -> Iterator[Claim]:
    """What depends on how the data are divided."""
    row = f"unbalanced: {OURS}"
    largest = seeds[0].largest_share
    floor = seeds[0].rows[row]["cluster_share_tv_floor"]
    yield measured(
        f"total variation of cluster shares, largest cluster {100 * largest:.0f} % (real images: {floor:.3f})",
        "≤ 0.02, cluster ≥ 40 %",
        [seed.rows[row]["cluster_share_tv"] for seed in seeds],
        lambda value: value <= 0.02 and largest >= 0.4,
    )
    chance = Ratio.of(seeds, f"{MAIN}: {OURS}", f"K = 8, random clusters: {OURS}")
    yield chance.claim("feature clusters against random clusters", 1.0)
    many = Ratio.of(seeds, f"K = 16: {OURS}", MONOLITH)
    yield many.claim("K = 16 at the same global batch against the monolith", 1.0)


def router_claims(seeds: Sequence[Seed]) -> Iterator[Claim]:
    """What depends on the router."""
    shares = [seed.flops["router"] / seed.flops["experts"] for seed in seeds]
    times = mean(seeds, lambda seed: seed.flops["router x 4"] / seed.flops["router"])
    gaps = [100 * (seed.router["router x 4"] - seed.router[MAIN]) for seed in seeds]
    yield Claim(
        name="router's training FLOPs over the experts', and what one of more FLOPs gains in accuracy",
        bar="≤ 3 %, within 1 point of 4 x",
        value=f"{100 * statistics.mean(shares):.2f} %, {statistics.mean(gaps):+.2f} points at {times:.1f} x",
        spread=f"{min(gaps):+.2f} to {max(gaps):+.2f} points",
        holds=max(shares) <= 0.03 and statistics.mean(gaps) <= 1,
    )
    sees = Ratio.of(seeds, "guided: top_k_1", "blind: top_k_1")
    seen, unseen = (mean(seeds, lambda seed, n=n: seed.accuracy[n]) for n in ("guided: top_k_1", "blind: top_k_1"))
    yield sees.claim(
        "router that sees the class against one that does not, top-1, guidance 2",
        1.0,
        f"; class accuracy {seen:.3f} against {unseen:.3f}",
        holds=seen >= unseen,
    )


def missing_claim(seeds: Sequence[Seed]) -> Claim:
    """Losing an expert must cost content, not quality."""
    lost = Ratio.of(seeds, f"{MAIN}: one missing", f"{MAIN}: {OURS}")
    kept = {
        space: mean(seeds, lambda seed, s=space: _precision(seed, "one missing", s) / _precision(seed, OURS, s))
        for space in SPACES
    }
    distances = ", ".join(f"{statistics.mean(found):.2f}" for found in lost.values.values())
    return Claim(
        name="losing one of eight experts: precision over that of all eight",
        bar="≥ 0.95 in both, distances reported",
        value=", ".join(f"{value:.3f} ({space})" for space, value in kept.items()) + f"; FD {distances} x",
        spread=", ".join(f"FD {min(found):.2f} to {max(found):.2f}" for found in lost.values.values()),
        holds=min(kept.values()) >= 0.95,
    )


def _precision(seed: Seed, row: str, space: str) -> float:
    return _at(seed, f"{MAIN}: {row}", space, "precision")


def listings(seeds: Sequence[Seed]) -> Iterator[Listing]:
    """Every row in every space, what is the same in all spaces, and the FLOPs."""
    for space in SPACES:
        yield distances(seeds, space)
    yield shares(seeds)
    yield Listing(
        title="Training FLOPs over the monolith's",
        columns=("", "of the monolith's"),
        rows=[(name, cost(seeds, name)) for name in seeds[0].flops],
    )
    yield Listing(
        title="Routers: accuracy over all t",
        columns=("arm", "accuracy"),
        rows=[(name, spread([seed.router[name] for seed in seeds])) for name in seeds[0].router],
    )


def distances(seeds: Sequence[Seed], space: str) -> Listing:
    """Fréchet distance, KID, precision and recall of every row in one space."""
    lines = []
    for name in seeds[0].rows:
        base = "guided: monolith" if name.startswith(("guided", "blind")) else MONOLITH
        ratio = Ratio.of(seeds, name, base)
        cells = [
            f"{spread([scale * _at(seed, name, space, key) for seed in seeds])} ({statistics.mean(of[space]):.2f})"
            for key, scale, of in (("fd", 1, ratio.values), ("kid", 1000, ratio.kid))
        ]
        seen = [spread([_at(seed, name, space, key) for seed in seeds]) for key in ("precision", "recall")]
        lines.append((name, *cells, *seen))
    found = seeds[0].rows[MONOLITH]["spaces"][space]
    floors = [f"{scale * found[f'{key}_floor']:.3f}" for key, scale in (("fd", 1), ("kid", 1000))]
    lines.append(("*floor*", *floors, f"{found['precision_floor']:.3f}", f"{found['recall_floor']:.3f}"))
    return Listing(
        title=f"In the space {space}",
        columns=("", "FD (to mono)", "KID ×1000 (to mono)", "precision", "recall"),
        rows=lines,
    )


def shares(seeds: Sequence[Seed]) -> Listing:
    """What is the same in every space: coverage, shares, memorising, cost."""
    keys = ("class_coverage", "class_tv", "cluster_share_tv", "nn_ratio", "calls_per_step")
    lines = []
    for name in seeds[0].rows:
        seen = [seed.accuracy[name] for seed in seeds if name in seed.accuracy]
        cells = [spread([seed.rows[name][key] for seed in seeds]) for key in keys]
        lines.append((name, *cells, spread(seen) if seen else ""))
    columns = (
        "",
        "class coverage",
        "class TV",
        "cluster share TV",
        "NN ratio",
        "expert calls a step",
        "class accuracy",
    )
    return Listing(title="Coverage, shares, memorising and cost", columns=columns, rows=lines)


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def notes(seeds: int) -> str:
    """What the numbers are."""
    return (
        f"Mean over {seeds} seeds ± their standard deviation; the number in brackets is the mean ratio to the monolith "
        "with the same seed (of guided rows: to the guided monolith). Codec, partitions and the samples' seeds are the "
        "same for all. A floor is the score of as many real training images. Rows that are not guided are of "
        "unconditional samples; unbalanced means three clusters of pixels of whatever size they have."
    )


if __name__ == "__main__":
    main()
