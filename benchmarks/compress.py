"""Pruning and quantization of trained experts, against what each must beat (`make bench-compress`): every claim.

`benchmarks/compress_arms.py` says what is trained, `benchmarks/compress_found.py` what is measured. Ratios are to the
whole ensemble from the same noise, by the mean over the seeds; KID is that of EfficientNet-lite0's features.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.compress_found import INT8, PARTS, PRUNED, SLIM, Found, all_found, asked, origins
from benchmarks.record import RESULTS, Claim, Listing, write_result
from ddm_core.artifacts import to_jsonable

Seeds = Sequence[Found]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What is said of a part, and a picture of it."""

    claims: Callable[[Seeds], Iterator[Claim]]
    lists: Callable[[Seeds], Iterator[Listing]]
    pictures: Mapping[str, Callable[[Seeds, Path], None]] = field(default_factory=dict)
    """By file name."""


def main() -> None:
    """Measure everything with every seed, write docs/benchmarks/compress.json and its picture, and print the claims."""
    options = asked(__doc__)
    write_sections("compress", SECTIONS, all_found(options.folder, options.seeds, PARTS, kept=options.kept), NOTE)


def write_sections(script: str, sections: Mapping[str, Section], found: Mapping[str, Seeds], note: str) -> None:
    """Write the results and pictures of all parts that were measured; the others are named."""
    known = {part: seeds for part, seeds in found.items() if seeds}
    for part, seeds in known.items():
        for name, picture in sections[part].pictures.items():
            picture(seeds, RESULTS / name)
    numbers = ", ".join(f"{part.replace('_', ' ')} {len(seeds)}" for part, seeds in found.items())
    seconds, where, commit = origins(known)
    result = write_result(
        script,
        seconds,
        [said for part, seeds in known.items() for said in sections[part].claims(seeds)],
        [listing for part, seeds in known.items() for listing in sections[part].lists(seeds)],
        [f"Means over so many seeds: {numbers}. {note}"],
        where=where,
        commit=commit,
    )
    print(json.dumps(to_jsonable(result["claims"]), indent=1))


def of_layers(seeds: Seeds) -> Iterator[Claim]:
    """Pruning and switching."""
    yield claim(
        "additivity of layer costs, U-Net: Spearman over 100 random sets (over those of at most 5 layers: "
        f"{mean(seeds, lambda s: s['additivity']['spearman_small']):.3f})",
        "≥ 0.95",
        [s["additivity"]["spearman"] for s in seeds],
        lambda value: value >= 0.95,
    )
    losses = [(s["kid"]["ours"] - 1) / (s["kid"]["magnitude"] - 1) for s in seeds]
    yield claim(
        "LAPTOP-Diff at 50 % of parameters: KID loss over that of magnitude pruning with the same retraining",
        "≤ 0.5",
        losses,
        lambda value: value <= 0.5,
    )
    yield claim(
        "the same: KID over the whole network's (over that of the whole network trained on for as long: "
        f"{mean(seeds, lambda s: s['kid']['ours'] / s['kid trained on']):.3f})",
        "≤ 1.10",
        [s["kid"]["ours"] for s in seeds],
        lambda v: v <= 1.10,
    )
    errors = [s["retrained"]["ours"] / s["retrained"]["no features"] for s in seeds]
    yield claim("output error with feature distillation over that without", "≤ 0.85", errors, lambda v: v <= 0.85)
    for other, bar in (("random", 0.2), ("magnitude", 0.5)):
        ratios = [s["ecodiff learned"] / s[f"ecodiff {other}"] for s in seeds]
        yield claim(
            f"EcoDiff, 20 % of units, no retraining: relative L2 over that of {other} units",
            f"≤ {bar}",
            ratios,
            lambda value, bar=bar: value <= bar,
        )
    clean, noisy = ([s[f"switch {side}"] for s in seeds] for side in ("clean", "noisy"))
    l2, kid = ([a[key] / b[key] for a, b in zip(clean, noisy, strict=True)] for key in ("l2", "kid"))
    yield Claim(
        name="switching at t = 0.5: small network where samples are clean over small where they are noisy",
        bar="both orders, both metrics",
        value=f"relative L2 {statistics.mean(l2):.3f}, KID {statistics.mean(kid):.3f}",
        spread=f"{min(l2):.3f} to {max(l2):.3f}, {min(kid):.3f} to {max(kid):.3f}",
        holds=True,
    )


def of_numbers(seeds: Seeds) -> Iterator[Claim]:
    """Weights and activations in few bits."""
    yield claim(
        "additivity of layer costs, transformer: Spearman over 100 random sets",
        "≥ 0.95",
        [s["additivity"]["spearman"] for s in seeds],
        lambda value: value >= 0.95,
    )
    for key, of in (("error", "output"), ("l2", "samples, relative L2")):
        parts = [s["svdquant"][key] / min(s["smooth"][key], s["low rank"][key]) for s in seeds]
        yield claim(f"SVDQuant W4A4: error of {of} over min(smoothing, SVD)", "≤ 0.7", parts, lambda v: v <= 0.7)
        naive = [s["svdquant"][key] / s["naive"][key] for s in seeds]
        yield claim(f"SVDQuant W4A4: error of {of} over naive rounding's", "≤ 0.33", naive, lambda v: v <= 0.33)
    errors = [s[SLIM]["error"] / s["naive"]["error"] for s in seeds]
    yield claim(
        "the same: bytes on disk over bfloat16, scales and branch counted, with rank 12 and all in 4 bits (output's "
        f"error over naive rounding's: {statistics.mean(errors):.2f})",
        "≤ 0.30",
        [s[SLIM]["bytes"] for s in seeds],
        lambda value: value <= 0.30,
    )
    yield claim(
        "QuEST W4A4: output error after selective fine-tuning over before",
        "≤ 0.65",
        [s["quest"]["sensitive"] / s["quest"]["calibrated"] for s in seeds],
        lambda value: value <= 0.65,
    )
    yield claim("QuEST: share of parameters touched", "≤ 0.20", [s["quest share"] for s in seeds], lambda v: v <= 0.2)
    yield of_int8(seeds)
    yield claim("the same: KID", "≤ 1.02", [s["compute"]["kid"] for s in seeds], lambda value: value <= 1.02)
    yield claim(
        f"prune ({PRUNED:.0%}) and quantize, transformer: times less CPU time an image, both compiled"
        f"{'' if seeds[0][INT8] else ', without VNNI'} (neither: "
        f"{mean(seeds, lambda s: 1 / s['both']['cpu']['ratio']):.2f})",
        "≥ 3",
        [1 / s["both"]["compiled"]["ratio"] for s in seeds],
        lambda value: value >= 3,
    )
    yield claim("the same: times fewer bytes", "≥ 8", [1 / s["both"]["bytes"] for s in seeds], lambda v: v >= 8)
    yield claim(
        f"the same: KID (pruned alone: {mean(seeds, lambda s: s['pruned kid']):.3f})",
        "≤ 1.10",
        [s["both"]["kid"] for s in seeds],
        lambda value: value <= 1.10,
    )


def of_int8(seeds: Seeds) -> Claim:
    """Time of a transformer that multiplies in eight bits, on processors that have instructions for that."""
    name, bar = "int8 compute, transformer: times less CPU time an image, one thread", "≥ 2 where VNNI exists"
    eager, compiled = ([1 / s["compute"][key]["ratio"] for s in seeds] for key in ("cpu", "compiled"))
    able = [index for index, s in enumerate(seeds) if s[INT8]]
    if not able:
        value = f"not measured: no VNNI (the same numbers in float32: {statistics.mean(compiled):.2f})"
        return Claim(name=name, bar=bar, value=value, spread=f"n = {len(seeds)}", holds=False)
    neither = statistics.mean(eager[index] for index in able)
    return claim(
        f"{name}, both compiled (neither: {neither:.2f})", bar, [compiled[index] for index in able], lambda v: v >= 2
    )


def of_together(eight: Seeds) -> Iterator[Claim]:
    """A whole ensemble."""
    name = best_of(eight)
    disk, memory, kid = (mean(eight, lambda s, key=key: s[name][key]) for key in ("bytes", "memory", "kid"))
    yield Claim(
        name=f"whole ensemble of 8 over one uncompressed expert, on disk and in memory ({name})",
        bar="≤ 1.5 x at KID ≤ 1.05",
        value=f"{disk:.3f} x on disk, {memory:.3f} x in memory, KID {kid:.3f}",
        spread=f"KID {min(s[name]['kid'] for s in eight):.3f} to {max(s[name]['kid'] for s in eight):.3f}",
        holds=max(disk, memory) <= 1.5 and kid <= 1.05,
    )


def best_of(seeds: Seeds) -> str:
    """Of the ways to store eight experts that are small enough, the one of least KID."""
    scored = [name for name, one in seeds[0].items() if isinstance(one, dict) and "kid" in one]
    small = [name for name in scored if mean(seeds, lambda s, name=name: s[name]["bytes"]) <= 1.5]
    return min(small or scored, key=lambda name: mean(seeds, lambda s: s[name]["kid"]))


def claim(name: str, bar: str, values: Sequence[float], holds: Callable[[float], bool]) -> Claim:
    """About one number with every seed: its mean must hold."""
    middle = statistics.mean(values)
    return Claim(
        name=name,
        bar=bar,
        value=f"{middle:.3f}",
        spread=f"{min(values):.3f} to {max(values):.3f}, n = {len(values)}",
        holds=holds(middle),
    )


def mean(seeds: Seeds, value: Callable[[Found], float]) -> float:
    """Mean over the seeds."""
    return statistics.mean(value(seed) for seed in seeds)


def text(values: Sequence[float | None]) -> str:
    """Mean ± standard deviation."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return f"{statistics.mean(known):.3f} ± {statistics.stdev(known) if len(known) > 1 else 0:.3f}"


def layer_lists(seeds: Seeds) -> Iterator[Listing]:
    """What pruning and switching do."""
    rows = [
        (
            name,
            text([s["pruned"].get(name) for s in seeds]),
            text([s["retrained"][name] for s in seeds]),
            text([s["kid"].get(name) for s in seeds]),
            text([s["pixels"].get(name) for s in seeds]),
        )
        for name in ("ours", "no features", "magnitude")
    ]
    yield Listing(
        title="U-Net of 1.6 M without half of its parameters",
        columns=("layers chosen by", "output error", "after retraining", "KID ratio", "FD ratio, pixels"),
        rows=[({"ours": "output loss, knapsack"}.get(row[0], row[0]), *row[1:]) for row in rows],
    )
    sides = [(side, [s[f"switch {side}"] for s in seeds]) for side in ("clean", "noisy")]
    yield Listing(
        title="The pruned U-Net on one side of t = 0.5, the whole one on the other",
        columns=("the small one where samples are", "FLOPs", "relative L2", "KID ratio"),
        rows=[(side, *(text([one[key] for one in found]) for key in ("flops", "l2", "kid"))) for side, found in sides],
    )
    yield Listing(
        title="EcoDiff: 20 % of heads and hidden units gone, relative L2",
        columns=("units chosen by", "relative L2"),
        rows=[(name, text([s[f"ecodiff {name}"] for s in seeds])) for name in ("learned", "magnitude", "random")],
    )


def number_lists(seeds: Seeds) -> Iterator[Listing]:
    """What rounding does."""
    names = [name for name in seeds[0] if isinstance(seeds[0][name], dict) and "error" in seeds[0][name]]
    yield Listing(
        title="A transformer of width 384 in W4A4",
        columns=("", "output error", "relative L2 of samples", "bytes over bfloat16"),
        rows=[(name, *(text([s[name][key] for s in seeds]) for key in ("error", "l2", "bytes"))) for name in names],
    )
    yield Listing(
        title="QuEST W4A4: output error after each part",
        columns=("", "output error"),
        rows=[(name.replace("_", " "), text([s["quest"][name] for s in seeds])) for name in seeds[0]["quest"]],
    )


def together_lists(seeds: Seeds) -> Iterator[Listing]:
    """Eight U-Nets that began as one network."""
    keys = ("bytes", "memory", "l2", "kid", "pixels")
    names = [name for name, one in seeds[0].items() if isinstance(one, dict)]
    rows = [(name, *(text([s[name].get(key) for s in seeds]) for key in keys)) for name in names]
    yield Listing(
        title="Eight U-Nets of one start: bytes over one uncompressed expert's",
        columns=("", "on disk", "in memory", "relative L2", "KID ratio", "FD ratio, pixels"),
        rows=rows,
    )


def scatter(seeds: Seeds, path: Path) -> None:
    """Joint losses over sums of single ones, as a picture."""
    figure = Figure(figsize=(4.6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, seed in enumerate(seeds):
        found: dict[str, Any] = seed["additivity"]
        axes.loglog(found["sums"], found["joint"], ".", label=f"seed {number}")
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], color="#999999", linewidth=1)
    axes.set_xlabel("sum of the losses of single layers")
    axes.set_ylabel("loss of all of them together")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


NOTE = (
    "Fashion-MNIST at 16 x 16; the U-Net has 1.6 M parameters, the transformer 12 M (width 384, 4 layers, 16 tokens). "
    "Layers, EcoDiff and switching: the network that all experts begin with; the transformer is one network too, "
    "trained with a weight decay under which its random start fades. W4A4 is rounded as it would be and computed in "
    "float32; its speed is not measured. CPU time: one thread, both in turns. Bytes are those of the folders, JSON and "
    "scales too. KID on the pixels is left out: the whole ensembles' is at the floor there (0.001), so that a ratio "
    "to it says nothing. The seconds are those of all parts, of which two ran at once."
)
SECTIONS: Mapping[str, Section] = {
    "layers": Section(claims=of_layers, lists=layer_lists, pictures={"compress-additivity.png": scatter}),
    "together": Section(claims=of_together, lists=together_lists),
    "numbers": Section(claims=of_numbers, lists=number_lists),
}


if __name__ == "__main__":
    main()
