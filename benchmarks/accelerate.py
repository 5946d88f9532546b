"""Caches, drafts and students against as many plain steps as cost the same (`make bench-accelerate`): every claim.

`benchmarks/compress_arms.py` says what is trained, `benchmarks/accelerate_found.py` what is measured. Ratios are to the
ensemble in 50 Euler steps from the same noise, by the mean over the seeds; KID is of EfficientNet-lite0's features.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.accelerate_found import DEEP, LATE, LATER, LEARNING, PARTS, REFINED, STARTS, STEPS, STUDENTS
from benchmarks.compress import Section, Seeds, claim, mean, text, write_sections
from benchmarks.compress_found import Found, all_found, asked
from benchmarks.record import Claim, Listing
from ensemble.compression.acceleration.adaptive_schedule import optimal_compute_steps

KINDS = ("anchors", "autoregressive", "expert", "student")
"""Of drafts."""


def main() -> None:
    """Measure everything with every seed, write docs/benchmarks/accelerate.json and its pictures, print the claims."""
    options = asked(__doc__)
    write_sections("accelerate", SECTIONS, all_found(options.folder, options.seeds, PARTS, kept=options.kept), NOTE)


def of_unets(unets: Seeds) -> Iterator[Claim]:
    """DeepCache."""
    for name in DEEP:
        deep = [s[name] for s in unets]
        title = f"DeepCache, U-Nets, {name}"
        yield claim(f"{title}: times fewer FLOPs", "≥ 2.5", over(deep, "flops"), lambda v: v >= 2.5)
        ratios = [one["l2"] / one["fewer"]["l2"] for one in deep]
        kids = f"KID {average(deep, 'kid'):.3f}, of those {statistics.mean(one['fewer']['kid'] for one in deep):.3f}"
        yield claim(
            f"{title}: relative L2 over that of as many plain steps ({kids})", "≤ 0.6", ratios, lambda v: v <= 0.6
        )
    exact = [s["interval 1"] for s in unets]
    yield claim("DeepCache, interval 1: distance to the ensemble's images", "0", exact, lambda value: value == 0)
    yield claim(
        "DeepCache, interval 3: times less CPU time, one thread",
        "reported",
        [1 / s["cpu"] for s in unets],
        lambda value: value > 1,
    )


def of_transformers(transformers: Seeds) -> Iterator[Claim]:
    """Caches of layers, blocks and units, and diffusers' own."""
    best = [s["of the best"] for s in transformers]
    name = ", ".join(sorted({s["best"] for s in transformers}))
    yield claim(f"caching, transformer ({name}): times fewer FLOPs", "≥ 3.3", over(best, "flops"), lambda v: v >= 3.3)
    ratios = [one["l2"] / one["fewer"]["l2"] for one in best]
    yield claim("the same: relative L2 over that of as many plain steps", "≤ 0.3", ratios, lambda value: value <= 0.3)
    yield claim("the same: KID", "≤ 1.03", [one["kid"] for one in best], lambda value: value <= 1.03)
    yield claim(
        "the same: times less CPU time, one thread", "reported", [1 / s["cpu"] for s in transformers], lambda v: v > 1
    )
    yield of_union(transformers)
    yield of_programme()


def of_routes(routes: Seeds) -> Iterator[Claim]:
    """Schedules of each expert's own."""
    for order in (0, 1):
        ratios = [s[f"order {order}, own"]["l2"] / s[f"order {order}, shared"]["l2"] for s in routes]
        yield claim(
            f"route-aware schedules, order {order}: relative L2 over that of one schedule for all eight experts",
            "compared",
            ratios,
            lambda value: value > 0,
        )


def of_union(seeds: Seeds) -> Claim:
    """Whether the bubbling union repairs schedules that each module has for itself."""
    pairs = [(s[f"union {n} 3"]["l2"] / s[f"union {n} 0"]["l2"], n) for s in seeds for n in (2, 3, 5, 10)]
    by_interval = {n: statistics.mean(ratio for ratio, other in pairs if other == n) for n in (2, 3, 5, 10)}
    return Claim(
        name="adaptive caching: relative L2 with the bubbling union over that without, intervals 2, 3, 5, 10",
        bar="≤ 1 each",
        value=", ".join(f"{ratio:.3f}" for ratio in by_interval.values()),
        spread=f"{min(pairs)[0]:.3f} to {max(pairs)[0]:.3f}",
        holds=max(by_interval.values()) <= 1,
    )


def of_programme() -> Claim:
    """Whether the dynamic programme finds what trying all schedules finds."""
    generator, equal, tried = np.random.default_rng(0), 0, 0
    for steps in range(2, 11):
        for count in range(1, steps + 1):
            similar = generator.normal(size=(steps, steps))
            every = [(0, *rest) for rest in combinations(range(1, steps), count - 1)]
            best = max(value_of(similar, chosen) for chosen in every)
            equal += abs(value_of(similar, optimal_compute_steps(similar, count)) - best) < 1e-9
            tried += 1
    return Claim(
        name="adaptive caching: the dynamic programme's value equals that of trying all schedules",
        bar="always",
        value=f"{equal} of {tried}",
        spread="up to 10 steps",
        holds=equal == tried,
    )


def value_of(similar: np.ndarray, chosen: Sequence[int]) -> float:
    """How like the steps of a schedule are to those that they stand for."""
    last = [max(step for step in chosen if step <= t) for t in range(len(similar))]
    return float(sum(similar[last[t], t] for t in range(len(similar))))


def of_students(seeds: Seeds) -> Iterator[Claim]:
    """Few steps, and beginnings below t = 1."""
    yield from of_steps(seeds)
    yield from of_drafts(seeds)


def of_steps(seeds: Seeds) -> Iterator[Claim]:
    """Few steps."""
    for name in STUDENTS:
        for steps in (1, 2):
            yield against_plain(seeds, name, steps)
    for steps in TEACHER_BARS:
        yield against_teacher(seeds, best_student(seeds, steps), steps, "best student from t = 1")
    yield of_refined(seeds)
    for steps in (2, 4):
        for extra in (0, 1):
            yield hybrid(seeds, steps, extra)


def of_late(seeds: Seeds) -> Iterator[Claim]:
    """A step of students that begin below t = 1."""
    yield against_plain(seeds, LATE, 1)
    yield against_teacher(seeds, LATE, 1, "best student of all")
    yield of_refined(seeds)


TEACHER_BARS = {1: 1.5, 2: 1.2, 4: 1.05}
"""KID of a student over its teacher's, by its steps."""


def against_plain(seeds: Seeds, name: str, steps: int) -> Claim:
    """A student beside as many plain steps."""
    ratios = [s[f"{name}, {steps}"]["kid"] / s[f"plain, {steps}"]["kid"] for s in seeds]
    title = f"{name}, {steps} step{'s' * (steps > 1)}: KID over that of as many plain steps"
    return claim(title, "≤ 0.25", ratios, lambda value: value <= 0.25)


def against_teacher(seeds: Seeds, name: str, steps: int, which: str) -> Claim:
    """A student beside what it has learned from."""
    bar = TEACHER_BARS[steps]
    title = f"{which}, {steps} step{'s' * (steps > 1)} ({name}): KID over the teacher's in {STEPS}"
    return claim(title, f"≤ {bar}", [s[f"{name}, {steps}"]["kid"] for s in seeds], lambda value: value <= bar)


def of_refined(seeds: Seeds) -> Claim:
    """One step of a student and one of the expert."""
    refined = [s["refined, 1 + 1"] for s in seeds]
    drafts = ", ".join(sorted({one["student"] for one in refined}))
    return claim(
        f"one step of the student ({drafts}), one of the expert from t = {REFINED.t_start}: KID over "
        f"that of two plain steps (over the teacher's in {STEPS}: {average(refined, 'kid'):.3f})",
        "≤ 0.25",
        each([one["kid"] for one in refined], [s["plain, 2"]["kid"] for s in seeds]),
        lambda value: value <= 0.25,
    )


def best_student(seeds: Seeds, steps: int) -> str:
    """Of least KID."""
    return min(STUDENTS, key=lambda name: mean(seeds, lambda s: s[f"{name}, {steps}"]["kid"]))


def hybrid(seeds: Seeds, steps: int, extra: int) -> Claim:
    """Variety of what begins with a step of the base."""
    mixed = [s[f"base first, {steps} + {extra}"] for s in seeds]
    student = [s[f"{one['student']}, {steps}"] for s, one in zip(seeds, mixed, strict=True)]
    whole = [s["whole"] for s in seeds]
    shares = {
        key: [one[key] / base[key] for one, base in zip(mixed, whole, strict=True)]
        for key in ("recall", "vendi", "precision", "kid")
    }
    alone = {key: average(student, key) / average(whole, key) for key in ("recall", "vendi", "precision")}
    recall, vendi, precision, kid = (statistics.mean(shares[key]) for key in ("recall", "vendi", "precision", "kid"))
    return Claim(
        name=f"base first, then the student of {steps} steps, {extra} more: recall and Vendi score over the base's "
        f"(the student alone {alone['recall']:.2f}, {alone['vendi']:.2f})",
        bar="≥ 0.95 both",
        value=f"{recall:.3f}, {vendi:.3f}; precision {precision:.3f} (alone {alone['precision']:.2f}), KID {kid:.2f}",
        spread=f"{min(shares['recall']):.2f} to {max(shares['recall']):.2f}, "
        f"{min(shares['vendi']):.2f} to {max(shares['vendi']):.2f}",
        holds=min(recall, vendi) >= 0.95,
    )


def of_drafts(seeds: Seeds) -> Iterator[Claim]:
    """Beginnings below t = 1."""
    kind, t = best_beginning(seeds)
    best = [s[f"draft {kind} at {t}"]["kid"] for s in seeds]
    alone = [s[f"draft {kind} at {STARTS[0]}"]["kid"] for s in seeds]
    plain_2, plain_16 = ([s[f"plain, {steps}"]["kid"] for s in seeds] for steps in (2, 16))
    start = f"truncated start, 2 steps from t = {t} (draft: {kind})"
    yield claim(f"{start}: KID over that of 2 steps from noise", "≤ 0.2", each(best, plain_2), lambda v: v <= 0.2)
    yield claim("the same over that of the draft alone", "< 1", each(best, alone), lambda value: value < 1)
    yield claim("the same over that of 16 steps from noise", "≤ 1.1", each(best, plain_16), lambda value: value <= 1.1)
    curves = {
        kind: [mean(seeds, lambda s, name=f"draft {kind} at {t}": s[name]["kid"]) for t in STARTS] for kind in KINDS
    }
    inner = [kind for kind, curve in curves.items() if 0 < int(np.argmin(curve)) < len(STARTS) - 1]
    yield Claim(
        name="t of the beginning: drafts whose best is neither the least nor the largest that was tried",
        bar="interior optimum",
        value=", ".join(inner) or "none",
        spread=f"{len(STARTS)} values from {STARTS[0]} to {STARTS[-1]}",
        holds=bool(inner),
    )


def best_beginning(seeds: Seeds) -> tuple[str, float]:
    """Draft and t of least KID."""
    tried = [(kind, t) for kind in KINDS for t in STARTS[1:]]
    return min(tried, key=lambda one: mean(seeds, lambda s: s[f"draft {one[0]} at {one[1]}"]["kid"]))


def of_all(seeds: Seeds) -> Iterator[Claim]:
    """Everything together."""
    name = best_of_all(seeds)
    cheap = [1 / s[name]["cpu"] for s in seeds]
    yield claim(
        f"ensemble of 8, {name}: times less CPU time an image than in {STEPS} steps, one expert a step",
        "≥ 20",
        cheap,
        lambda value: value >= 20,
    )
    yield claim("the same: KID", "≤ 1.15", [s[name]["kid"] for s in seeds], lambda value: value <= 1.15)


def pipelines_of_all(seeds: Seeds) -> list[str]:
    """What was made of eight transformers with every seed; the first seed tried a recipe more, which missed."""
    return [name for name, one in seeds[0].items() if isinstance(one, dict) and all(name in seed for seed in seeds)]


def best_of_all(seeds: Seeds) -> str:
    """Of what is distilled, pruned and in eight bits, the quickest that keeps the KID, or else that of least KID."""
    tried = [name for name in pipelines_of_all(seeds) if name.endswith("8 bits") and "pruned" in name]
    kids = {name: mean(seeds, lambda s, name=name: s[name]["kid"]) for name in tried}
    good = [name for name in tried if kids[name] <= 1.15]
    if good:
        return min(good, key=lambda name: mean(seeds, lambda s: s[name]["cpu"]))
    return min(tried, key=lambda name: kids[name])


def unet_lists(seeds: Seeds) -> Iterator[Listing]:
    """Every cache of the U-Net."""
    yield cache_list(seeds, "DeepCache on a U-Net of 1.6 M")


def transformer_lists(seeds: Seeds) -> Iterator[Listing]:
    """Every cache of the transformer."""
    yield cache_list(seeds, "Caches of a transformer of 12 M")
    unions = [name for name in seeds[0] if name.startswith("union")]
    yield Listing(
        title="Adaptive schedules of each layer by itself, and with the bubbling union",
        columns=("interval, modules that take others along", "FLOPs", "relative L2"),
        rows=[(row[0].removeprefix("union ").replace(" ", ", "), *row[1:]) for row in rows_of(seeds, unions, NEARNESS)],
    )


NEARNESS = ("flops", "l2")


def cache_list(seeds: Seeds, title: str) -> Listing:
    """Caches beside as many plain steps."""
    names = [name for name, one in seeds[0].items() if isinstance(one, dict) and "fewer" in one]
    return Listing(
        title=f"{title}, {STEPS} Euler steps",
        columns=("", "times fewer FLOPs", "relative L2", "as many plain steps", "their relative L2"),
        rows=[
            (
                name,
                text(over([s[name] for s in seeds], "flops")),
                text([s[name]["l2"] for s in seeds]),
                text([float(s[name]["steps"]) for s in seeds]),
                text([s[name]["fewer"]["l2"] for s in seeds]),
            )
            for name in names
        ],
    )


def route_lists(seeds: Seeds) -> Iterator[Listing]:
    """Own schedules and shared ones."""
    yield Listing(
        title="Adaptive schedules of eight transformers: each expert's own, or one for all",
        columns=("", "FLOPs", "relative L2", "KID"),
        rows=rows_of(seeds, [name for name in seeds[0] if name.startswith("order")], (*NEARNESS, "kid")),
    )


def student_lists(seeds: Seeds) -> Iterator[Listing]:
    """Every student and every draft."""
    yield student_list(seeds, "Students of one transformer of 1.4 M")
    drafts = [name for name, one in seeds[0].items() if isinstance(one, dict) and name.startswith("draft")]
    yield Listing(
        title="Two steps from a draft (without a t: where the search by MMD began)",
        columns=STUDENT_COLUMNS[:-1],
        rows=rows_of(seeds, drafts, STUDENT_KEYS[:-1]),
    )


def late_lists(seeds: Seeds) -> Iterator[Listing]:
    """Every student that begins below t = 1."""
    yield student_list(seeds, "The same transformer: students that begin below t = 1 and learn for longer")


def student_list(seeds: Seeds, title: str) -> Listing:
    """What is no draft."""
    names = [name for name, one in seeds[0].items() if isinstance(one, dict) and not name.startswith("draft")]
    return Listing(title=title, columns=STUDENT_COLUMNS, rows=rows_of(seeds, names, STUDENT_KEYS))


STUDENT_KEYS = ("kid", "pixels", "precision", "recall", "vendi")
STUDENT_COLUMNS = ("", "KID", "FD, pixels", "precision", "recall", "Vendi score")


def all_lists(seeds: Seeds) -> Iterator[Listing]:
    """Eight transformers."""
    names = pipelines_of_all(seeds)
    keys = ("flops", "cpu", "bytes", "kid", "pixels", "precision", "recall")
    columns = ("", "FLOPs", "CPU time", "bytes", "KID", "FD, pixels", "precision", "recall")
    yield Listing(title="Eight transformers of 1.4 M", columns=columns, rows=rows_of(seeds, names, keys))


def rows_of(seeds: Seeds, names: Sequence[str], keys: Sequence[str]) -> list[tuple[str, ...]]:
    """A row for each name, mean and deviation of each key."""
    return [(name, *(text([s[name].get(key) for s in seeds]) for key in keys)) for name in names]


def over(found: Sequence[Found], key: str) -> list[float]:
    """One over a number, for each seed."""
    return [1 / one[key] for one in found]


def each(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Ratios."""
    return [a / b for a, b in zip(first, second, strict=True)]


def average(found: Sequence[Found], key: str) -> float:
    """Over the seeds."""
    return statistics.mean(float(one[key]) for one in found)


def beginnings(seeds: Seeds, path: Path) -> None:
    """KID by where drafts are refined from, as a picture."""
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for kind in KINDS:
        axes.plot(STARTS, [kid_of(seeds, f"draft {kind} at {t}") for t in STARTS], "o-", label=kind)
    for steps, style in ((2, ":"), (16, "--")):
        value = kid_of(seeds, f"plain, {steps}")
        axes.axhline(value, color="#777777", linestyle=style, label=f"{steps} steps from noise")
    axes.set_xlabel("t from which the draft is refined, in two steps")
    axes.set_ylabel("KID over that of 50 steps")
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8, ncol=2)
    figure.savefig(path, dpi=110)


def kid_of(seeds: Seeds, name: str) -> float:
    """Mean over the seeds."""
    return mean(seeds, lambda s: float(s[name]["kid"]))


def cost_of(seeds: Seeds, name: str) -> float:
    """CPU time, or FLOPs where that was not measured."""
    return mean(seeds, lambda s: float(s[name].get("cpu", s[name]["flops"])))


def front(seeds: Seeds, path: Path) -> None:
    """CPU time against KID of everything that was made of eight transformers, as a picture; the front in colour."""
    figure = Figure(figsize=(8.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [name for name in pipelines_of_all(seeds) if name != "whole"]
    points = {name: (cost_of(seeds, name), kid_of(seeds, name)) for name in names}
    for number, (name, (cost, kid)) in enumerate(sorted(points.items(), key=lambda one: one[1]), start=1):
        best = not any(c <= cost and k <= kid and (c, k) != (cost, kid) for c, k in points.values())
        axes.plot(cost, kid, "o", color="#c2410c" if best else "#94a3b8", label=f"{number}  {name}")
        beside = (3, 4) if number % 2 else (3, -10)
        axes.annotate(str(number), (cost, kid), fontsize=7, xytext=beside, textcoords="offset points")
    axes.plot(1, 1, "s", color="#111111", label=f"the ensemble in {STEPS} steps")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("CPU time of an image over the ensemble's (plain steps: FLOPs)")
    axes.set_ylabel("KID over the ensemble's")
    axes.margins(0.1)
    figure.legend(loc="outside right center", frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)


NOTE = (
    "Fashion-MNIST at 16 x 16; a U-Net of 1.6 M parameters, a transformer of 12 M (width 384), eight transformers of "
    "1.4 M (width 128, 4 layers, 16 tokens), and the network that those begin "
    f"with. All ratios are to {STEPS} Euler steps of the same ensemble, sticky, from the same noise. FLOPs are "
    "counted, of a first-block cache as a mean. CPU time: one thread, both in turns, not compiled; of eight "
    f"transformers a whole batch at once, 256 images. A draft at t = {STARTS[0]} is the draft alone. Students by SiD "
    f"learn for {LEARNING.steps} turns, those from t = {LATER.start} for {LATER.training.steps}. The seconds are "
    "those of all parts, of which two ran at once; training the U-Net and the transformer of 12 M is in those of "
    "`compress`."
)
SECTIONS: Mapping[str, Section] = {
    "unet_caches": Section(claims=of_unets, lists=unet_lists),
    "transformer_caches": Section(claims=of_transformers, lists=transformer_lists),
    "routes": Section(claims=of_routes, lists=route_lists),
    "students": Section(claims=of_students, lists=student_lists, pictures={"accelerate-beginnings.png": beginnings}),
    "late_students": Section(claims=of_late, lists=late_lists),
    "everything": Section(claims=of_all, lists=all_lists, pictures={"accelerate-front.png": front}),
}


if __name__ == "__main__":
    main()
