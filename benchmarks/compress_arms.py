"""What `benchmarks.compress` and `benchmarks.accelerate` train: a U-Net and a small transformer for each of eight
clusters, and a transformer of width 384.

All of Fashion-MNIST at 16 x 16. The experts of an arm start from one network that has seen all clusters for a while,
as experts of published models do, and then never hear of each other again. The transformer trains with a weight decay
under which its random start fades: after so few steps its weights would else be those of a network that knows nothing,
whose spectrum is flat and which no low rank can hold.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.finished_run import SPACES, FinishedRun, Scores
from ddm_core.artifacts import Workspace, read_json
from ensemble.compression.config import CompressionConfig, MethodConfig, TimingConfig
from ensemble.compression.measurement import REPORT_FILE, TIMING_FILE, Timing, time_both
from ensemble.compression.run import run_stage
from ensemble.evaluation.evaluate import evaluate
from experts.config import TrainingConfig
from orchestrator.pipeline.flop_matching import by_cluster
from orchestrator.pipeline.graph import plain_evaluation

BASE = (
    "data=fashion_full",
    "data.image_size=16",
    "data.fit=crop",
    "codec=pixels",
    "partition.features=random_conv",
    "partition.num_fine=128",
    "partition.iterations=10",
    "partition.seed=0",
    "expert.training.warmup_steps=50",
    "expert.training.condition_dropout=1",
    "router.training.condition_dropout=1",
    "router.width=48",
    "router.training.steps=400",
    "ensemble.solver=euler",
    "ensemble.steps=20",
    f"scores.spaces=[{','.join(SPACES)}]",
    "scores.num_samples=1024",
    "scores.seed=0",
    "monolith=false",
    "compute=inline",
    "wandb.mode=disabled",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the experts of one architecture come about."""

    network: Sequence[str]
    num_experts: int
    start: Sequence[str]
    """The training that all of them begin with."""
    own: Sequence[str]
    """The training of each on its own cluster; the batch is the global one."""


RECIPES: Mapping[str, Recipe] = {
    "unet": Recipe(
        network=("expert=unet", "expert.network.channels=[32,64,64]", "expert.network.layers_per_block=2"),
        num_experts=8,
        start=("expert.training.steps=1200", "expert.training.batch_size=64", "expert.training.lr=1e-3"),
        own=("expert.training.steps=400", "expert.training.batch_size=128", "expert.training.lr=5e-4"),
    ),
    "dit": Recipe(
        network=("expert=dit", "expert.network.heads=6", "expert.network.head_width=64", "expert.network.depth=4"),
        num_experts=1,
        start=(
            "expert.training.steps=800",
            "expert.training.batch_size=64",
            "expert.training.lr=1e-3",
            "expert.training.weight_decay=6",
        ),
        own=(),
    ),
    "small": Recipe(
        network=("expert=dit", "expert.network.heads=4", "expert.network.head_width=32", "expert.network.depth=4"),
        num_experts=8,
        start=(
            "expert.training.steps=3000",
            "expert.training.batch_size=64",
            "expert.training.lr=2e-3",
            "expert.training.weight_decay=0.5",
        ),
        own=("expert.training.steps=400", "expert.training.batch_size=256", "expert.training.lr=5e-4"),
    ),
}


class Arm(FinishedRun):
    """A trained ensemble and everything that is made of it."""

    @property
    def whole(self) -> Path:
        """The ensemble that nothing was done to."""
        return self.folder("ensemble")

    def made(self, name: str, recipe: MethodConfig, ensemble: Path | None = None) -> Path:
        """The ensemble that a recipe makes, with its comparison; what is finished already is found."""
        out = self.extra(name)
        if not (out / REPORT_FILE).exists():
            shutil.rmtree(out, ignore_errors=True)
            clusters = by_cluster(self.folder("partition") / "clusters")
            config = CompressionConfig(method=recipe, sampling=self.config.ensemble, labelled=False)
            space = Workspace.at(self.run.root / "work" / f"{out.name}")
            run_stage(config, ensemble or self.whole, self.whole, clusters, out, space)
            shutil.rmtree(space.scratch)
        return out

    def scores(self, pipeline: Path) -> Scores:
        """Scores of a pipeline, by space; its images are drawn from the same seeds whatever was done to it."""
        return dict(read_json(self.scored(pipeline) / "scores.json")["spaces"])

    def scored(self, pipeline: Path, steps: int | None = None) -> Path:
        """The folder of scores and images of a pipeline, sampled in the arm's own number of steps or in another."""
        sampling = self.config.ensemble if steps is None else replace(self.config.ensemble, steps=steps)
        out = self.extra(f"scores-{pipeline.name}-in-{sampling.steps}")
        if not (out / "scores.json").exists():
            out.mkdir(parents=True, exist_ok=True)
            folders = (pipeline, self.folder("reference"), self.folder("partition"))
            space = Workspace.at(self.run.root / "work" / out.name)
            evaluate(*folders, plain_evaluation(self.config), sampling, out, space)
        return out

    def kid(self, pipeline: Path) -> float:
        """KID over that of the whole ensemble, on EfficientNet's features."""
        return self.ratio(pipeline, SPACES[1], "kid")

    def ratio(self, pipeline: Path, space: str, key: str) -> float:
        """A score over that of the whole ensemble."""
        return float(self.scores(pipeline)[space][key]) / float(self.scores(self.whole)[space][key])

    def cpu(self, pipeline: Path, *, compile: bool = False, images: int = TimingConfig.num_images) -> Timing:
        """Processor time of an image against the whole ensemble's, both of them compiled or neither; measured once."""
        out = self.extra(f"{'compiled' if compile else 'timing'}-{images}-{pipeline.name}")
        if not (out / TIMING_FILE).exists():
            out.mkdir(parents=True, exist_ok=True)
            space = Workspace.at(self.run.root / "work" / out.name)
            sampling = replace(self.config.ensemble, compile=compile)
            time_both(TimingConfig(sampling=sampling, num_images=images), pipeline, self.whole, out, space)
        return Timing(**read_json(out / TIMING_FILE))

    def extra(self, name: str) -> Path:
        """A folder beside the run's own artifacts, one for each number of experts and seed."""
        return self.run.root / "extra" / f"{name}-k{self.config.partition.num_experts}-seed{self.config.seed}"


def start_of(name: str, seed: int, folder: Path, more: Sequence[str] = ()) -> Arm:
    """The network that all experts of an architecture begin with: an ensemble of one."""
    return Arm.of(name, [*_given(name, seed, folder), *RECIPES[name].start, "partition.num_experts=1", *more])


def trained_on(name: str, seed: int, folder: Path, training: TrainingConfig) -> Arm:
    """That network after some more training on its data."""
    own = (
        f"expert.training.steps={training.steps}",
        f"expert.training.batch_size={training.batch_size}",
        f"expert.training.lr={training.lr}",
        f"expert.init={start_of(name, seed, folder).folder('expert_0')}",
    )
    return Arm.of(name, [*_given(name, seed, folder), *own, "partition.num_experts=1"])


def train(name: str, seed: int, folder: Path, more: Sequence[str] = ()) -> Arm:
    """The trained ensemble of an architecture; what is finished already is found."""
    recipe, start = RECIPES[name], start_of(name, seed, folder)
    own = [*recipe.own, f"partition.num_experts={recipe.num_experts}", f"expert.init={start.folder('expert_0')}"]
    return Arm.of(name, [*_given(name, seed, folder), *own, *more])


def _given(name: str, seed: int, folder: Path) -> list[str]:
    return [*BASE, *RECIPES[name].network, f"seed={seed}", f"folder={folder / name}"]
