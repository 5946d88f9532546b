"""Pruning and quantization of trained experts, against the baseline of each (`make bench-compress`): every claim.

`benchmarks/arms/compress.py` defines the training, `benchmarks/arms/compress_measurements.py` the measurements. Ratios
are to the original ensemble from the same noise, as means over the seeds. KID uses EfficientNet-lite0's features.
"""

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.arms.compress_measurements import INT8, PARTS, PRUNED, SLIM, collect_measurements, parse_arguments
from benchmarks.record import Claim, Listing
from benchmarks.report import Section, Seeds, format_mean, mean_claim, mean_over_seeds, write_sections


def main() -> None:
    """Measure with every seed, write docs/benchmarks/compress.json and its picture, and print the claims."""
    options = parse_arguments(__doc__)
    measurements = collect_measurements(options.folder, options.seeds, PARTS, report_only=options.report_only)
    write_sections("compress", SECTIONS, measurements, NOTE)


def layer_claims(seeds: Seeds) -> Iterator[Claim]:
    """Yield the claims on pruning and stitching."""
    yield mean_claim(
        "additivity of layer costs, U-Net: Spearman over 100 random sets (over sets of at most 5 layers: "
        f"{mean_over_seeds(seeds, lambda s: s['additivity']['spearman_small']):.3f})",
        "≥ 0.95",
        [s["additivity"]["spearman"] for s in seeds],
        lambda value: value >= 0.95,
    )
    losses = [(s["kid"]["ours"] - 1) / (s["kid"]["magnitude"] - 1) for s in seeds]
    yield mean_claim(
        "LAPTOP-Diff at 50 % of parameters: KID loss over that of magnitude pruning with the same retraining",
        "≤ 0.5",
        losses,
        lambda value: value <= 0.5,
    )
    yield mean_claim(
        "the same: KID over the original network's (over that of the original trained for as many extra steps: "
        f"{mean_over_seeds(seeds, lambda s: s['kid']['ours'] / s['kid trained on']):.3f})",
        "≤ 1.10",
        [s["kid"]["ours"] for s in seeds],
        lambda v: v <= 1.10,
    )
    errors = [s["retrained"]["ours"] / s["retrained"]["no features"] for s in seeds]
    yield mean_claim("output error with feature distillation over that without", "≤ 0.85", errors, lambda v: v <= 0.85)
    for criterion, target in (("random", 0.2), ("magnitude", 0.5)):
        ratios = [s["ecodiff learned"] / s[f"ecodiff {criterion}"] for s in seeds]
        yield mean_claim(
            f"EcoDiff, 20 % of units, no retraining: relative L2 over that of units chosen by {CRITERIA[criterion]}",
            f"≤ {target}",
            ratios,
            lambda value, target=target: value <= target,
        )
    clean, noisy = ([s[f"switch {side}"] for s in seeds] for side in ("clean", "noisy"))
    l2, kid = ([a[key] / b[key] for a, b in zip(clean, noisy, strict=True)] for key in ("l2", "kid"))
    yield Claim(
        name="stitching at t = 0.5: small network for clean samples over small network for noisy samples",
        bar="both orders, both metrics",
        value=f"relative L2 {statistics.mean(l2):.3f}, KID {statistics.mean(kid):.3f}",
        spread=f"{min(l2):.3f} to {max(l2):.3f}, {min(kid):.3f} to {max(kid):.3f}",
        holds=True,
    )


CRITERIA = {"random": "chance", "magnitude": "magnitude"}


def number_claims(seeds: Seeds) -> Iterator[Claim]:
    """Yield the claims on low-bit weights and activations."""
    yield mean_claim(
        "additivity of layer costs, transformer: Spearman over 100 random sets",
        "≥ 0.95",
        [s["additivity"]["spearman"] for s in seeds],
        lambda value: value >= 0.95,
    )
    for key, quantity in (("error", "output error"), ("l2", "relative L2 of samples")):
        ablated = [s["svdquant"][key] / min(s["smooth"][key], s["low rank"][key]) for s in seeds]
        yield mean_claim(f"SVDQuant W4A4: {quantity} over min(smoothing, SVD)", "≤ 0.7", ablated, lambda v: v <= 0.7)
        naive = [s["svdquant"][key] / s["naive"][key] for s in seeds]
        yield mean_claim(f"SVDQuant W4A4: {quantity} over naive rounding's", "≤ 0.33", naive, lambda v: v <= 0.33)
    errors = [s[SLIM]["error"] / s["naive"]["error"] for s in seeds]
    yield mean_claim(
        "the same: bytes on disk over bfloat16, scales and branch counted, with rank 12 and all in 4 bits (output "
        f"error over naive rounding's: {statistics.mean(errors):.2f})",
        "≤ 0.30",
        [s[SLIM]["bytes"] for s in seeds],
        lambda value: value <= 0.30,
    )
    yield mean_claim(
        "QuEST W4A4: output error after selective fine-tuning over before",
        "≤ 0.65",
        [s["quest"]["sensitive"] / s["quest"]["calibrated"] for s in seeds],
        lambda value: value <= 0.65,
    )
    shares = [s["quest share"] for s in seeds]
    yield mean_claim("QuEST: share of fine-tuned parameters", "≤ 0.20", shares, lambda v: v <= 0.2)
    yield int8_claim(seeds)
    yield mean_claim("the same: KID", "≤ 1.02", [s["compute"]["kid"] for s in seeds], lambda value: value <= 1.02)
    yield mean_claim(
        f"prune ({PRUNED:.0%}) and quantize, transformer: × lower CPU time per image, both compiled"
        f"{'' if seeds[0][INT8] else ', without VNNI'} (neither compiled: "
        f"{mean_over_seeds(seeds, lambda s: 1 / s['both']['cpu']['ratio']):.2f})",
        "≥ 3",
        [1 / s["both"]["compiled"]["ratio"] for s in seeds],
        lambda value: value >= 3,
    )
    yield mean_claim("the same: × fewer bytes", "≥ 8", [1 / s["both"]["bytes"] for s in seeds], lambda v: v >= 8)
    yield mean_claim(
        f"the same: KID (pruned only: {mean_over_seeds(seeds, lambda s: s['pruned kid']):.3f})",
        "≤ 1.10",
        [s["both"]["kid"] for s in seeds],
        lambda value: value <= 1.10,
    )


def int8_claim(seeds: Seeds) -> Claim:
    """Return the claim on CPU time of a transformer with int8 matrix products, on processors with VNNI."""
    name, target = "int8 compute, transformer: × lower CPU time per image, one thread", "≥ 2 with VNNI"
    eager, compiled = ([1 / s["compute"][key]["ratio"] for s in seeds] for key in ("cpu", "compiled"))
    with_vnni = [index for index, s in enumerate(seeds) if s[INT8]]
    if not with_vnni:
        value = f"not measured: no VNNI (the same numbers in float32: {statistics.mean(compiled):.2f})"
        return Claim(name=name, bar=target, value=value, spread=f"n = {len(seeds)}", holds=False)
    eager_mean = statistics.mean(eager[index] for index in with_vnni)
    return mean_claim(
        f"{name}, both compiled (neither compiled: {eager_mean:.2f})",
        target,
        [compiled[index] for index in with_vnni],
        lambda v: v >= 2,
    )


def ensemble_claims(seeds: Seeds) -> Iterator[Claim]:
    """Yield the claim on the size of an ensemble of eight."""
    name = best_storage_format(seeds)
    disk, memory, kid = (mean_over_seeds(seeds, lambda s, key=key: s[name][key]) for key in ("bytes", "memory", "kid"))
    yield Claim(
        name=f"size of a compressed ensemble of 8 over one uncompressed expert, on disk and in memory ({name})",
        bar="≤ 1.5 × at KID ≤ 1.05",
        value=f"{disk:.3f} × on disk, {memory:.3f} × in memory, KID {kid:.3f}",
        spread=f"KID {min(s[name]['kid'] for s in seeds):.3f} to {max(s[name]['kid'] for s in seeds):.3f}",
        holds=max(disk, memory) <= 1.5 and kid <= 1.05,
    )


def best_storage_format(seeds: Seeds) -> str:
    """Return the storage format with the lowest KID among those that are small enough."""
    scored = [name for name, numbers in seeds[0].items() if isinstance(numbers, dict) and "kid" in numbers]
    small = [name for name in scored if mean_over_seeds(seeds, lambda s, name=name: s[name]["bytes"]) <= 1.5]
    return min(small or scored, key=lambda name: mean_over_seeds(seeds, lambda s: s[name]["kid"]))


def layer_listings(seeds: Seeds) -> Iterator[Listing]:
    """Yield the tables on pruning and stitching."""
    labels = {"ours": "output loss, knapsack", "no features": "the same, without feature distillation"}
    rows = [
        (
            labels.get(name, name),
            format_mean([s["pruned"].get(name) for s in seeds]),
            format_mean([s["retrained"][name] for s in seeds]),
            format_mean([s["kid"].get(name) for s in seeds]),
            format_mean([s["pixels"].get(name) for s in seeds]),
        )
        for name in ("ours", "no features", "magnitude")
    ]
    yield Listing(
        title="U-Net of 1.6 M parameters, pruned to half",
        columns=("layers chosen by", "output error", "after retraining", "KID ratio", "FD ratio, pixels"),
        rows=rows,
    )
    sides = [(side, [s[f"switch {side}"] for s in seeds]) for side in ("clean", "noisy")]
    yield Listing(
        title="Stitching: the pruned U-Net on one side of t = 0.5, the original on the other",
        columns=("samples of the small network", "FLOPs", "relative L2", "KID ratio"),
        rows=[
            (side, *(format_mean([numbers[key] for numbers in stitched]) for key in ("flops", "l2", "kid")))
            for side, stitched in sides
        ],
    )
    yield Listing(
        title="EcoDiff: 20 % of heads and hidden units pruned, relative L2",
        columns=("units chosen by", "relative L2"),
        rows=[
            (name, format_mean([s[f"ecodiff {name}"] for s in seeds])) for name in ("learned", "magnitude", "random")
        ],
    )


def number_listings(seeds: Seeds) -> Iterator[Listing]:
    """Yield the tables on quantization."""
    names = [name for name in seeds[0] if isinstance(seeds[0][name], dict) and "error" in seeds[0][name]]
    yield Listing(
        title="A transformer of width 384 in W4A4",
        columns=("method", "output error", "relative L2 of samples", "bytes over bfloat16"),
        rows=[
            (name, *(format_mean([s[name][key] for s in seeds]) for key in ("error", "l2", "bytes"))) for name in names
        ],
    )
    yield Listing(
        title="QuEST W4A4: output error after each part",
        columns=("after", "output error"),
        rows=[(name.replace("_", " "), format_mean([s["quest"][name] for s in seeds])) for name in seeds[0]["quest"]],
    )


def ensemble_listings(seeds: Seeds) -> Iterator[Listing]:
    """Yield the table on eight U-Nets that started from one network."""
    keys = ("bytes", "memory", "l2", "kid", "pixels")
    names = [name for name, numbers in seeds[0].items() if isinstance(numbers, dict)]
    rows = [(name, *(format_mean([s[name].get(key) for s in seeds]) for key in keys)) for name in names]
    yield Listing(
        title="Eight U-Nets from one initial network: bytes over one uncompressed expert's",
        columns=("format", "on disk", "in memory", "relative L2", "KID ratio", "FD ratio, pixels"),
        rows=rows,
    )


def plot_additivity(seeds: Seeds, path: Path) -> None:
    """Plot joint losses over sums of single losses."""
    figure = Figure(figsize=(4.6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, seed in enumerate(seeds):
        additivity: dict[str, Any] = seed["additivity"]
        axes.loglog(additivity["sums"], additivity["joint"], ".", label=f"seed {number}")
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], color="#999999", linewidth=1)
    axes.set_xlabel("sum of the losses of single layers")
    axes.set_ylabel("loss of all of them together")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


NOTE = (
    "Fashion-MNIST at 16 x 16; the U-Net has 1.6 M parameters, the transformer 12 M (width 384, 4 layers, 16 tokens). "
    "Layers, EcoDiff and stitching use the network that all experts start from. The transformer is also a single "
    "network, trained with a weight decay under which its random initialization fades. W4A4 is simulated: values are "
    "rounded to 4 bits and computed in float32; its speed is not measured. CPU time: one thread, both sides "
    "alternating. Bytes are those of the folders, including JSON and scales. KID on pixels is left out: the original "
    "ensembles' is at the floor there (0.001), so a ratio to it is meaningless. The seconds are the sum over all "
    "parts, two of which ran concurrently."
)
SECTIONS: Mapping[str, Section] = {
    "layers": Section(
        claims=layer_claims, listings=layer_listings, pictures={"compress-additivity.png": plot_additivity}
    ),
    "together": Section(claims=ensemble_claims, listings=ensemble_listings),
    "numbers": Section(claims=number_claims, listings=number_listings),
}


if __name__ == "__main__":
    main()
