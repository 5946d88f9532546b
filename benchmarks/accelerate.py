"""Caches, drafts and students against as many plain steps as cost the same (`make bench-accelerate`): every claim.

`benchmarks/arms/compress.py` defines the training, `benchmarks/arms/accelerate_measurements.py` the measurements, and
`benchmarks/accelerate_listings.py` the tables and pictures. Ratios are to the ensemble in 50 Euler steps from the same
noise, as means over the seeds. KID uses EfficientNet-lite0's features.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np

from benchmarks.accelerate_listings import (
    DRAFTS,
    cost_listings,
    draw_cost_front,
    draw_draft_curves,
    late_listings,
    route_listings,
    student_listings,
    tested_pipelines,
    transformer_listings,
    unet_listings,
)
from benchmarks.arms.accelerate_measurements import (
    LATE_NAME,
    LATE_STUDENT,
    PARTS,
    REFINED,
    SCORED_CACHES,
    SID_TRAINING,
    STEPS,
    STUDENTS,
    T_STARTS,
)
from benchmarks.arms.compress_measurements import Measurements, collect_measurements, parse_arguments
from benchmarks.record import Claim
from benchmarks.report import Section, Seeds, mean_claim, mean_over_seeds, write_sections
from ensemble.compression.acceleration.adaptive_schedule import optimal_compute_steps


def main() -> None:
    """Measure with every seed, write docs/benchmarks/accelerate.json and its pictures, print the claims."""
    options = parse_arguments(__doc__)
    measurements = collect_measurements(options.folder, options.seeds, PARTS, report_only=options.report_only)
    write_sections("accelerate", SECTIONS, measurements, NOTE)


def unet_claims(seeds: Seeds) -> Iterator[Claim]:
    """Yield the claims on DeepCache."""
    for name in SCORED_CACHES:
        cached = [s[name] for s in seeds]
        title = f"DeepCache, U-Nets, {name}"
        yield mean_claim(f"{title}: × fewer FLOPs", "≥ 2.5", _inverses(cached, "flops"), lambda v: v >= 2.5)
        ratios = [numbers["l2"] / numbers["fewer"]["l2"] for numbers in cached]
        plain_kid = statistics.mean(numbers["fewer"]["kid"] for numbers in cached)
        yield mean_claim(
            f"{title}: relative L2 over that of plain steps at equal FLOPs "
            f"(KID {_average(cached, 'kid'):.3f}, plain steps {plain_kid:.3f})",
            "≤ 0.6",
            ratios,
            lambda v: v <= 0.6,
        )
    distances = [s["interval 1"] for s in seeds]
    yield mean_claim("DeepCache, interval 1: distance to the original images", "0", distances, lambda value: value == 0)
    yield mean_claim(
        "DeepCache, interval 3: × lower CPU time, one thread",
        "reported",
        [1 / s["cpu"] for s in seeds],
        lambda value: value > 1,
    )


def transformer_claims(seeds: Seeds) -> Iterator[Claim]:
    """Yield the claims on caches of layers, blocks and units, and on diffusers' caches."""
    best = [s["of the best"] for s in seeds]
    name = ", ".join(sorted({s["best"] for s in seeds}))
    yield mean_claim(
        f"caching, transformer ({name}): × fewer FLOPs", "≥ 3.3", _inverses(best, "flops"), lambda v: v >= 3.3
    )
    ratios = [numbers["l2"] / numbers["fewer"]["l2"] for numbers in best]
    yield mean_claim(
        "the same: relative L2 over that of plain steps at equal FLOPs", "≤ 0.3", ratios, lambda value: value <= 0.3
    )
    yield mean_claim("the same: KID", "≤ 1.03", [numbers["kid"] for numbers in best], lambda value: value <= 1.03)
    yield mean_claim(
        "the same: × lower CPU time, one thread", "reported", [1 / s["cpu"] for s in seeds], lambda v: v > 1
    )
    yield union_claim(seeds)
    yield dynamic_program_claim()


def route_claims(seeds: Seeds) -> Iterator[Claim]:
    """Yield the claims on cache schedules per expert."""
    for order in (0, 1):
        ratios = [s[f"order {order}, own"]["l2"] / s[f"order {order}, shared"]["l2"] for s in seeds]
        yield mean_claim(
            f"route-aware schedules, order {order}: relative L2 over that of one schedule for all eight experts",
            "compared",
            ratios,
            lambda value: value > 0,
        )


def union_claim(seeds: Seeds) -> Claim:
    """Return the claim that the bubbling union improves independent schedules of modules."""
    ratios = [(s[f"union {n} 3"]["l2"] / s[f"union {n} 0"]["l2"], n) for s in seeds for n in (2, 3, 5, 10)]
    by_interval = {n: statistics.mean(ratio for ratio, interval in ratios if interval == n) for n in (2, 3, 5, 10)}
    return Claim(
        name="adaptive caching: relative L2 with the bubbling union over that without, intervals 2, 3, 5, 10",
        bar="≤ 1 each",
        value=", ".join(f"{ratio:.3f}" for ratio in by_interval.values()),
        spread=f"{min(ratios)[0]:.3f} to {max(ratios)[0]:.3f}",
        holds=max(by_interval.values()) <= 1,
    )


def dynamic_program_claim() -> Claim:
    """Return the claim that the dynamic program equals exhaustive search over all schedules."""
    generator, num_equal, num_tried = np.random.default_rng(0), 0, 0
    for steps in range(2, 11):
        for count in range(1, steps + 1):
            similarity = generator.normal(size=(steps, steps))
            schedules = [(0, *rest) for rest in combinations(range(1, steps), count - 1)]
            best = max(_schedule_value(similarity, schedule) for schedule in schedules)
            num_equal += abs(_schedule_value(similarity, optimal_compute_steps(similarity, count)) - best) < 1e-9
            num_tried += 1
    return Claim(
        name="adaptive caching: the dynamic program's value equals that of exhaustive search",
        bar="always",
        value=f"{num_equal} of {num_tried}",
        spread="up to 10 steps",
        holds=num_equal == num_tried,
    )


def _schedule_value(similarity: np.ndarray, schedule: Sequence[int]) -> float:
    """Return the total similarity between every step and the last computed step at or before it."""
    last = [max(step for step in schedule if step <= t) for t in range(len(similarity))]
    return float(sum(similarity[last[t], t] for t in range(len(similarity))))


def student_claims(seeds: Seeds) -> Iterator[Claim]:
    """Yield the claims on few-step students and on truncated sampling."""
    for name in STUDENTS:
        for steps in (1, 2):
            yield plain_steps_claim(seeds, name, steps)
    for steps in TEACHER_TARGETS:
        yield teacher_claim(seeds, best_student(seeds, steps), steps, "best student from t = 1")
    yield refined_claim(seeds)
    for steps in (2, 4):
        for extra in (0, 1):
            yield base_first_claim(seeds, steps, extra)
    yield from draft_claims(seeds)


def late_claims(seeds: Seeds) -> Iterator[Claim]:
    """Yield the claims on a step of a student that starts below t = 1."""
    yield plain_steps_claim(seeds, LATE_NAME, 1)
    yield teacher_claim(seeds, LATE_NAME, 1, "best student of all")
    yield refined_claim(seeds)


TEACHER_TARGETS = {1: 1.5, 2: 1.2, 4: 1.05}
"""Highest KID of a student over its teacher's, by number of steps."""


def plain_steps_claim(seeds: Seeds, name: str, steps: int) -> Claim:
    """Compare a student with the same number of plain steps."""
    ratios = [s[f"{name}, {steps}"]["kid"] / s[f"plain, {steps}"]["kid"] for s in seeds]
    title = f"{name}, {steps} step{'s' * (steps > 1)}: KID over that of the same number of plain steps"
    return mean_claim(title, "≤ 0.25", ratios, lambda value: value <= 0.25)


def teacher_claim(seeds: Seeds, name: str, steps: int, label: str) -> Claim:
    """Compare a student with its teacher."""
    target = TEACHER_TARGETS[steps]
    title = f"{label}, {steps} step{'s' * (steps > 1)} ({name}): KID over the teacher's in {STEPS} steps"
    return mean_claim(
        title, f"≤ {target}", [s[f"{name}, {steps}"]["kid"] for s in seeds], lambda value: value <= target
    )


def refined_claim(seeds: Seeds) -> Claim:
    """Compare one step of a student plus one of the expert with two plain steps."""
    refined = [s["refined, 1 + 1"] for s in seeds]
    names = ", ".join(sorted({numbers["student"] for numbers in refined}))
    return mean_claim(
        f"one step of the student ({names}), one of the expert from t = {REFINED.t_start}: KID over that of two plain "
        f"steps (over the teacher's in {STEPS} steps: {_average(refined, 'kid'):.3f})",
        "≤ 0.25",
        _ratios([numbers["kid"] for numbers in refined], [s["plain, 2"]["kid"] for s in seeds]),
        lambda value: value <= 0.25,
    )


def best_student(seeds: Seeds, steps: int) -> str:
    """Return the student with the lowest mean KID."""
    return min(STUDENTS, key=lambda name: mean_over_seeds(seeds, lambda s: s[f"{name}, {steps}"]["kid"]))


def base_first_claim(seeds: Seeds, steps: int, extra: int) -> Claim:
    """Compare the variety of samples whose first steps the base computes with the base's."""
    base_first = [s[f"base first, {steps} + {extra}"] for s in seeds]
    students = [s[f"{numbers['student']}, {steps}"] for s, numbers in zip(seeds, base_first, strict=True)]
    bases = [s["whole"] for s in seeds]
    ratios = {
        key: [numbers[key] / base[key] for numbers, base in zip(base_first, bases, strict=True)]
        for key in ("recall", "vendi", "precision", "kid")
    }
    alone = {key: _average(students, key) / _average(bases, key) for key in ("recall", "vendi", "precision")}
    recall, vendi, precision, kid = (statistics.mean(ratios[key]) for key in ("recall", "vendi", "precision", "kid"))
    return Claim(
        name=f"base first, then the student of {steps} steps, {extra} extra base steps: recall and Vendi score over "
        f"the base's (student alone {alone['recall']:.2f}, {alone['vendi']:.2f})",
        bar="≥ 0.95 both",
        value=f"{recall:.3f}, {vendi:.3f}; precision {precision:.3f} (alone {alone['precision']:.2f}), KID {kid:.2f}",
        spread=f"{min(ratios['recall']):.2f} to {max(ratios['recall']):.2f}, "
        f"{min(ratios['vendi']):.2f} to {max(ratios['vendi']):.2f}",
        holds=min(recall, vendi) >= 0.95,
    )


def draft_claims(seeds: Seeds) -> Iterator[Claim]:
    """Yield the claims on truncated sampling."""
    draft, t = best_draft(seeds)
    best = [s[f"draft {draft} at {t}"]["kid"] for s in seeds]
    draft_alone = [s[f"draft {draft} at {T_STARTS[0]}"]["kid"] for s in seeds]
    plain_2, plain_16 = ([s[f"plain, {steps}"]["kid"] for s in seeds] for steps in (2, 16))
    title = f"truncated sampling, 2 steps from t = {t} (draft: {draft})"
    yield mean_claim(
        f"{title}: KID over that of 2 steps from noise", "≤ 0.2", _ratios(best, plain_2), lambda v: v <= 0.2
    )
    yield mean_claim(
        "the same over that of the draft alone", "< 1", _ratios(best, draft_alone), lambda value: value < 1
    )
    yield mean_claim(
        "the same over that of 16 steps from noise", "≤ 1.1", _ratios(best, plain_16), lambda value: value <= 1.1
    )
    curves = {
        name: [mean_over_seeds(seeds, lambda s, key=f"draft {name} at {t}": s[key]["kid"]) for t in T_STARTS]
        for name in DRAFTS
    }
    interior = [name for name, curve in curves.items() if 0 < int(np.argmin(curve)) < len(T_STARTS) - 1]
    yield Claim(
        name="t_start: drafts whose best t_start is neither the smallest nor the largest tested",
        bar="interior optimum",
        value=", ".join(interior) or "none",
        spread=f"{len(T_STARTS)} values from {T_STARTS[0]} to {T_STARTS[-1]}",
        holds=bool(interior),
    )


def best_draft(seeds: Seeds) -> tuple[str, float]:
    """Return the draft and t_start with the lowest mean KID."""
    candidates = [(draft, t) for draft in DRAFTS for t in T_STARTS[1:]]
    return min(candidates, key=lambda pair: mean_over_seeds(seeds, lambda s: s[f"draft {pair[0]} at {pair[1]}"]["kid"]))


def everything_claims(seeds: Seeds) -> Iterator[Claim]:
    """Yield the claims on all methods together."""
    name = best_combination(seeds)
    yield mean_claim(
        f"ensemble of 8, {name}: × lower CPU time per image than in {STEPS} steps, one expert per step",
        "≥ 20",
        [1 / s[name]["cpu"] for s in seeds],
        lambda value: value >= 20,
    )
    yield mean_claim("the same: KID", "≤ 1.15", [s[name]["kid"] for s in seeds], lambda value: value <= 1.15)


def best_combination(seeds: Seeds) -> str:
    """Return the fastest distilled, pruned 8-bit pipeline whose KID holds; if none holds, that of the lowest KID."""
    candidates = [name for name in tested_pipelines(seeds) if name.endswith("8 bits") and "pruned" in name]
    kids = {name: mean_over_seeds(seeds, lambda s, name=name: s[name]["kid"]) for name in candidates}
    good = [name for name in candidates if kids[name] <= 1.15]
    if good:
        return min(good, key=lambda name: mean_over_seeds(seeds, lambda s: s[name]["cpu"]))
    return min(candidates, key=lambda name: kids[name])


def _inverses(measurements: Sequence[Measurements], key: str) -> list[float]:
    return [1 / numbers[key] for numbers in measurements]


def _ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def _average(measurements: Sequence[Measurements], key: str) -> float:
    return statistics.mean(float(numbers[key]) for numbers in measurements)


NOTE = (
    "Fashion-MNIST at 16 x 16; a U-Net of 1.6 M parameters, a transformer of 12 M (width 384), eight transformers of "
    "1.4 M (width 128, 4 layers, 16 tokens), and the network that those start from. "
    f"All ratios are to {STEPS} Euler steps of the same ensemble, with sticky selection and the same noise. FLOPs are "
    "counted; those of a first-block cache are a mean. CPU time: one thread, both sides alternating, not compiled; for "
    f"eight transformers, one batch of 256 images. A draft at t = {T_STARTS[0]} is the draft alone. SiD students "
    f"train for {SID_TRAINING.steps} iterations, those from t = {LATE_STUDENT.start} for "
    f"{LATE_STUDENT.training.steps}. The seconds are the sum over all parts, two of which ran concurrently; the "
    "training of the U-Net and of the transformer of 12 M is counted in `compress`."
)
SECTIONS: Mapping[str, Section] = {
    "unet_caches": Section(claims=unet_claims, listings=unet_listings),
    "transformer_caches": Section(claims=transformer_claims, listings=transformer_listings),
    "routes": Section(claims=route_claims, listings=route_listings),
    "students": Section(
        claims=student_claims, listings=student_listings, pictures={"accelerate-drafts.png": draw_draft_curves}
    ),
    "late_students": Section(claims=late_claims, listings=late_listings),
    "everything": Section(
        claims=everything_claims, listings=cost_listings, pictures={"accelerate-front.png": draw_cost_front}
    ),
}


if __name__ == "__main__":
    main()
