"""What each paper says, beside what this project measures: docs/papers.md (`make bench-papers`).

Each row has a criterion and a control that must fail it. Networks are small and trained for a minute on digits of 8 x 8
pixels, or exact in closed form; one seed unless a row says otherwise.
"""

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.arms import (
    assembly_rows,
    compression_rows,
    few_step_rows,
    learngenes_rows,
    pruning_rows,
    recipe_rows,
    replication_rows,
    reward_rows,
    time_rows,
)
from benchmarks.arms.paper_networks import (
    ring_of_gaussians,
    select_digits,
    squared_mmd_of,
    train_digits,
    train_experts,
    two_gaussians,
)
from benchmarks.arms.paper_row import YES, PaperRow
from benchmarks.page import render_table
from benchmarks.record import RESULTS, Claim, Listing, write_result
from ddm_core.artifacts import Workspace, read_json, write_text
from ensemble.analysis.diffusion_classifier import VelocityModels, create_models, denoising_errors, eliminate_classes
from ensemble.compression.distillation.config import ConsistencyConfig
from ensemble.compression.distillation.consistency import train_consistency
from ensemble.config import ClassifierConfig
from ensemble.ensemble import Ensemble
from experts.conditions.condition import Condition
from experts.config import TrainingConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from router.config import RouterConfig
from router.quality import measure_quality
from router.router import Router, count_priors
from router.train import fit_router

COLUMNS = ("paper", "what it says", "our file", "command", "criterion", "ours", "theirs", "what differs", "holds")


DENSITY_ROUTERS = {
    "density": RouterConfig(kind="density"),
    "mlp": RouterConfig(training=TrainingConfig(steps=1000, batch_size=256, lr=1e-3, t_std=1.4)),
}
NO_ROWS = """## Without a row

Built, and measured in [benchmarks](benchmarks.md) or by tests alone: truncated start, DeepCache, TaylorSeer, adaptive
caching, EcoDiff, SVDQuant by error, SiD, MMD-DDM and base first.

Not built:
"""
NOT_BUILT = (
    "CAT-DM's implicit start by a generator of its own; Trajectory Diffuser's draft under a return",
    "DiffusionDrive's confidence head for prompts (for classes, shares of the anchors are exact)",
    "A-SDM's global-regional attention",
    "DivControl's adapter for several conditions, whose gates a network computes from the condition's text",
    "SVDQuant in the layout of a library with 4-bit kernels (weights are packed in one of our own)",
    "rCM's score term beside continuous-time consistency; guidance of a mean flow as an input",
    "AnimateLCM; SpeedUpNet's consistency over several steps; a stage that fits a regressor of rewards",
)


def main() -> None:
    """Measure rows, write the results and the page; rows that are not measured now are kept from the last time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*MEASUREMENTS], help=f"rows: {', '.join(MEASUREMENTS)}")
    parser.add_argument("--folder", type=Path, help="keeps the trained networks for the next call")
    arguments = parser.parse_args()
    names, seconds_of, measured = arguments.names, dict[str, float](), dict[str, PaperRow]()
    with TemporaryDirectory() as folder:
        for name in names:
            started = time.process_time()
            measured[name] = MEASUREMENTS[name](arguments.folder or Path(folder))
            seconds_of[name] = time.process_time() - started
            print(name, measured[name].ours, flush=True)
    file = RESULTS / "papers.json"
    earlier = read_json(file) if file.is_file() else {"figures": {}, "listings": [{"rows": []}]}
    known = {cells[0]: PaperRow(*cells[1:-1], holds=cells[-1] == YES) for cells in earlier["listings"][0]["rows"]}
    rows = {name: (known | measured)[name] for name in MEASUREMENTS if name in known | measured}
    seconds = {name: earlier["figures"].get(name, 0.0) for name in known}
    seconds |= seconds_of
    claims = [
        Claim(name=f"{row.paper}: {row.says}", bar=row.criterion, value=row.ours, spread="", holds=row.holds)
        for row in rows.values()
    ]
    listing = Listing(
        title="Papers", columns=("row", *COLUMNS), rows=[(name, *row.cells()) for name, row in rows.items()]
    )
    write_result("papers", sum(seconds.values()), claims, [listing], ["Seconds are processor time."], seconds)
    write_text(
        RESULTS.parent / "papers.md", render_page([*rows.values()], [name for name in MEASUREMENTS if name not in rows])
    )


def render_page(rows: Sequence[PaperRow], unmeasured: Sequence[str]) -> str:
    """Return `docs/papers.md`; `unmeasured` are the names of rows without figures."""
    introduction = (
        "# Papers\n\nGenerated by `python -m benchmarks.papers` (`make bench-papers`). Ours are small networks on "
        "digits or\nemoji, or exact mixtures; the papers' figures are of large networks, so only direction and ratio "
        "compare.\n"
    )
    missing = "\n".join(f"* {text}" for text in NOT_BUILT)
    waiting = f"Built, with a row that is not measured yet: {', '.join(unmeasured)}.\n\n" if unmeasured else ""
    without = NO_ROWS.replace("Not built:", f"{waiting}Not built:")
    return f"{introduction}\n{render_table(COLUMNS, [row.cells() for row in rows])}\n{without}\n{missing}\n"


def measure_reflection(folder: Path) -> PaperRow:
    """Reflect exact mixtures whose shares are wrong; the truth is .50."""
    strong, weak = 0.35, 0.225
    reached = [two_gaussians(strong, weak, steps) for steps in (20, 40, 80)]
    five, reversed_roles = two_gaussians(strong, weak, 40, 5), two_gaussians(weak, strong, 40)
    unchanged = abs(two_gaussians(strong, strong, 40) - two_gaussians(strong, None, 40))
    return PaperRow(
        paper="Weak-to-Strong (2502.00473)",
        says="reflection along strong minus weak moves samples to the real distribution",
        file="ensemble/sampling/guidance.py",
        command="ddm sample RUN --reflect 99",
        criterion="share .50 ± .03 in 20, 40, 80 steps; equal models: moved ≤ .03; reversed: worse",
        ours=f"{_joined(reached)}; equal: moved {unchanged:.3f}; reversed {reversed_roles:.3f}; five steps {five:.3f}",
        theirs="HPS v2 +.3 to +1.2 on SDXL and others; no closed form",
        differs="exact mixture of two Gaussians; strong .35, weak .225",
        holds=max(abs(value - 0.5) for value in reached) <= 0.03 and unchanged <= 0.03 and reversed_roles < weak,
    )


def measure_classifier(folder: Path) -> PaperRow:
    """Classify held-out digits with all pairs, with elimination, and with independent noise at the same calls."""
    expert, _ = train_digits("dit", folder)
    models = create_models(Ensemble(experts={0: expert}, noise_schedule=RECTIFIED_FLOW))
    held_out = select_digits("dit", held_out=True)
    clean, labels = held_out.clean, held_out.class_id
    config = ClassifierConfig(noises_per_image=32)
    inputs = models, clean, 10, RECTIFIED_FLOW
    full = denoising_errors(*inputs, config)[0].argmin(1)
    errors, rows = eliminate_classes(*inputs, replace(config, elimination=3))
    calls = rows / (len(clean) * 10 * config.noises_per_image)
    equal = replace(config, noises_per_image=math.ceil(calls * config.noises_per_image))
    unpaired = [
        denoising_errors(_of_class(models, k), clean, 1, RECTIFIED_FLOW, replace(equal, seed=k))[0, :, 0]
        for k in range(10)
    ]
    guesses = (full, errors[0].argmin(1), torch.stack(unpaired, 1).argmin(1))
    accuracy, early, independent = (float((guess == labels).double().mean()) for guess in guesses)
    return PaperRow(
        paper="Diffusion Classifier (2303.16203)",
        says="paired noise and successive elimination keep the accuracy at a fraction of the calls",
        file="ensemble/analysis/diffusion_classifier.py",
        command="ddm classify RUN --draws 32 --eliminate 3",
        criterion="accuracy within .005 of full at ≤ .3 × calls; independent noise in as many calls worse",
        ours=f"{early:.3f} against {accuracy:.3f} at {calls:.3f} × calls; independent noise {independent:.3f}",
        theirs="ImageNet 77.1 % (DiT-XL/2, 256 px)",
        differs="300 held-out digits, 32 pairs; classes leave by standard errors of the paired difference",
        holds=early >= accuracy - 0.005 and calls <= 0.3 and independent < early,
    )


def measure_density_router(folder: Path) -> PaperRow:
    """Route held-out digits by the losses of four experts, and by a router that was trained with all data."""
    experts, data, held_out = train_experts(folder)
    accuracies: dict[str, list[float]] = {}
    for name, config in DENSITY_ROUTERS.items():
        out, counts = folder / name, count_priors(data.cluster_id, data.class_id, len(experts), 0)
        fit_router(config, data, held_out, out, Workspace.at(out / "work"), counts, experts=experts)
        router = replace(Router.load(out), experts=experts)
        quality = measure_quality(router, held_out, max_images=100)
        accuracies[name] = [row.accuracy_null for row in quality.bins[:8:2]]
    largest = float(held_out.cluster_id.bincount().max()) / len(held_out)
    means = {name: sum(values) / len(values) for name, values in accuracies.items()}
    return PaperRow(
        paper="Diffusion Classifier (2303.16203), of experts",
        says="losses classify, so the losses of the experts can route without a router that sees all data",
        file="router/models/density.py",
        command="ddm run router=density",
        criterion="accuracy within .02 of the trained router's at t < .1, .2 … .3, .4 … .5, .6 … .7 (mean)",
        ours=(
            f"{_joined(accuracies['density'])} (mean {means['density']:.3f}); trained {_joined(accuracies['mlp'])} "
            f"(mean {means['mlp']:.3f}); largest cluster {largest:.3f}"
        ),
        theirs="not measured",
        differs="four clusters of digits; noised samples, whose density follows from the rest of the forward process",
        holds=means["density"] >= means["mlp"] - 0.02,
    )


def _of_class(models: VelocityModels, k: int) -> VelocityModels:
    """Return the same models under one class only."""
    return lambda noised, t, condition: models(noised, t, Condition(torch.full_like(condition.class_id, k)))


def measure_consistency(folder: Path) -> PaperRow:
    """Train consistency students on a ring of Gaussians with outliers, with three losses."""
    training = TrainingConfig(steps=1500, batch_size=128, lr=1e-3, warmup_steps=20, checkpoint_every=10**6)
    distances: dict[str, float] = {}
    for loss in ("cauchy", "pseudo_huber", "l2"):
        expert, dataset, real = ring_of_gaussians(outliers=0.05)
        config = ConsistencyConfig(loss=loss, steps=1, coupling=False, training=training)
        student = train_consistency(expert, dataset, config, Workspace.at(folder / loss)).network
        distances[loss] = squared_mmd_of(student, real)
    huber, squared = (distances["cauchy"] / distances[name] for name in ("pseudo_huber", "l2"))
    return PaperRow(
        paper="sLCT (2502.01441)",
        says="the Cauchy loss is robust to outliers where pseudo-Huber is not",
        file="ensemble/compression/distillation/consistency.py",
        command="ddm compress RUN distill=consistency",
        criterion="5 % outliers, one step: Cauchy ≤ .7 × pseudo-Huber's MMD; L2 ≥ 3 × Cauchy's",
        ours=f"{huber:.3f} × pseudo-Huber's, {squared:.3f} × L2's (Cauchy {distances['cauchy']:.4f})",
        theirs="FID 7.27 against 37.15 of iLCT on CelebA-HQ, one step (all ingredients)",
        differs="two dimensions, loss alone; coupling is off here, as optimal transport is exact in two dimensions",
        holds=huber <= 0.7 and squared <= 1 / 3,
    )


def _joined(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


MEASUREMENTS: Mapping[str, Callable[[Path], PaperRow]] = {
    "reflection": measure_reflection,
    **pruning_rows.ROWS,
    **assembly_rows.ROWS,
    "classifier": measure_classifier,
    "density_router": measure_density_router,
    "consistency": measure_consistency,
    **compression_rows.ROWS,
    **replication_rows.ROWS,
    **few_step_rows.ROWS,
    **recipe_rows.ROWS,
    **reward_rows.ROWS,
    **time_rows.ROWS,
    **learngenes_rows.ROWS,
}

if __name__ == "__main__":
    main()
