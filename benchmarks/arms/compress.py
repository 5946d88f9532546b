"""Training for `benchmarks.compress` and `benchmarks.accelerate`.

For each of eight clusters, a U-Net and a small transformer; in addition, one transformer of width 384. The data set is
all of Fashion-MNIST at 16 x 16. The experts of an arm start from one network that was trained on all clusters for a
while, as experts of published models do. They then train independently.

The transformer trains with a weight decay under which its random initialization fades. After so few steps its weights
would otherwise resemble those of an untrained network, whose spectrum is flat and has no good low-rank approximation.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from benchmarks.arms.finished_run import SPACES, FinishedRun, Scores
from ddm_core.artifacts import Workspace, read_json
from ensemble.compression.config import BATCH_SIZES, CompressionConfig, MethodConfig, TimingConfig
from ensemble.compression.measurement import Timing, time_both
from ensemble.compression.report import REPORT_FILE, TIMING_FILE
from ensemble.compression.run import open_clusters, run_stage
from ensemble.evaluation.evaluate import evaluate
from experts.config import TrainingConfig
from orchestrator.pipeline.stage_configs import evaluation_config
from orchestrator.pipeline.stage_inputs import cluster_folders

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
class ArchitectureConfig:
    """Overrides that train the experts of one architecture."""

    network: Sequence[str]
    num_experts: int
    pretraining: Sequence[str]
    """Training on all clusters; every expert starts from its result."""
    expert_training: Sequence[str]
    """Training of each expert on its cluster; the batch is the global one."""


ARCHITECTURES: Mapping[str, ArchitectureConfig] = {
    "unet": ArchitectureConfig(
        network=("expert=unet", "expert.network.channels=[32,64,64]", "expert.network.layers_per_block=2"),
        num_experts=8,
        pretraining=("expert.training.steps=1200", "expert.training.batch_size=64", "expert.training.lr=1e-3"),
        expert_training=("expert.training.steps=400", "expert.training.batch_size=128", "expert.training.lr=5e-4"),
    ),
    "dit": ArchitectureConfig(
        network=("expert=dit", "expert.network.heads=6", "expert.network.head_width=64", "expert.network.depth=4"),
        num_experts=1,
        pretraining=(
            "expert.training.steps=800",
            "expert.training.batch_size=64",
            "expert.training.lr=1e-3",
            "expert.training.weight_decay=6",
        ),
        expert_training=(),
    ),
    "small": ArchitectureConfig(
        network=("expert=dit", "expert.network.heads=4", "expert.network.head_width=32", "expert.network.depth=4"),
        num_experts=8,
        pretraining=(
            "expert.training.steps=3000",
            "expert.training.batch_size=64",
            "expert.training.lr=2e-3",
            "expert.training.weight_decay=0.5",
        ),
        expert_training=("expert.training.steps=400", "expert.training.batch_size=256", "expert.training.lr=5e-4"),
    ),
}


class Arm(FinishedRun):
    """A trained ensemble and all pipelines that compression makes of it."""

    @property
    def original(self) -> Path:
        """Return the folder of the uncompressed ensemble."""
        return self.artifact_folder("ensemble")

    def compress(self, name: str, method: MethodConfig, ensemble: Path | None = None) -> Path:
        """Compress `ensemble` (default: the original) and return the result's folder, with its report.

        A finished result is reused.
        """
        out = self.extra_folder(name)
        if not (out / REPORT_FILE).exists():
            shutil.rmtree(out, ignore_errors=True)
            clusters = cluster_folders(self.artifact_folder("partition") / "clusters")
            config = CompressionConfig(method=method, sampling=self.config.ensemble, labelled=False)
            workspace = Workspace.at(self.run_folder.root / "work" / f"{out.name}")
            held_out = cluster_folders(self.artifact_folder("partition") / "holdout_latents")
            run_stage(config, ensemble or self.original, self.original, clusters, out, workspace, held_out)
            shutil.rmtree(workspace.scratch)
        return out

    def load_scores(self, pipeline: Path) -> Scores:
        """Return the scores of a pipeline, by feature space; all pipelines sample with the same seeds."""
        return dict(read_json(self.score(pipeline) / "scores.json")["spaces"])

    def score(self, pipeline: Path, steps: int | None = None) -> Path:
        """Sample and score a pipeline in `steps` steps (default: the arm's); return the folder of scores and images.

        Finished scores are reused.
        """
        sampling = self.config.ensemble if steps is None else replace(self.config.ensemble, steps=steps)
        out = self.extra_folder(f"scores-{pipeline.name}-in-{sampling.steps}")
        if not (out / "scores.json").exists():
            out.mkdir(parents=True, exist_ok=True)
            folders = (pipeline, self.artifact_folder("reference"), self.artifact_folder("partition"))
            workspace = Workspace.at(self.run_folder.root / "work" / out.name)
            evaluate(*folders, evaluation_config(self.config), sampling, out, workspace)
        return out

    def kid_ratio(self, pipeline: Path) -> float:
        """Return the KID over the original ensemble's, on EfficientNet's features."""
        return self.score_ratio(pipeline, SPACES[1], "kid")

    def score_ratio(self, pipeline: Path, space: str, key: str) -> float:
        """Return a score over the original ensemble's."""
        return float(self.load_scores(pipeline)[space][key]) / float(self.load_scores(self.original)[space][key])

    def time_cpu(self, pipeline: Path, *, compile: bool = False, images: int = BATCH_SIZES[-1]) -> Timing:
        """Measure the processor time of an image against the original's, with both compiled or neither.

        A finished measurement is reused.
        """
        out = self.extra_folder(f"{'compiled' if compile else 'timing'}-{images}-{pipeline.name}")
        if not (out / TIMING_FILE).exists():
            out.mkdir(parents=True, exist_ok=True)
            workspace = Workspace.at(self.run_folder.root / "work" / out.name)
            sampling = replace(self.config.ensemble, compile=compile)
            data = open_clusters([], self.original, labeled=False)
            config = TimingConfig(sampling=sampling, batch_sizes=(images,))
            time_both(config, pipeline, self.original, data, out, workspace)
        return TypeAdapter(Timing).validate_python(read_json(out / TIMING_FILE))

    def extra_folder(self, name: str) -> Path:
        """Return a folder outside the run's artifacts, unique to the number of experts and the seed."""
        return self.run_folder.root / "extra" / f"{name}-k{self.config.partition.num_experts}-seed{self.config.seed}"


def train_start(name: str, seed: int, folder: Path, overrides: Sequence[str] = ()) -> Arm:
    """Train the network that all experts of an architecture start from; it is an ensemble of one."""
    pretraining = ARCHITECTURES[name].pretraining
    return Arm.complete(
        name, [*_base_overrides(name, seed, folder), *pretraining, "partition.num_experts=1", *overrides]
    )


def train_start_longer(name: str, seed: int, folder: Path, training: TrainingConfig) -> Arm:
    """Continue the training of that network on the same data."""
    longer_training = (
        f"expert.training.steps={training.steps}",
        f"expert.training.batch_size={training.batch_size}",
        f"expert.training.lr={training.lr}",
        f"expert.init={train_start(name, seed, folder).artifact_folder('expert_0')}",
    )
    return Arm.complete(name, [*_base_overrides(name, seed, folder), *longer_training, "partition.num_experts=1"])


def train_ensemble(name: str, seed: int, folder: Path, overrides: Sequence[str] = ()) -> Arm:
    """Train the ensemble of an architecture; finished stages are reused."""
    architecture, start = ARCHITECTURES[name], train_start(name, seed, folder)
    training = [
        *architecture.expert_training,
        f"partition.num_experts={architecture.num_experts}",
        f"expert.init={start.artifact_folder('expert_0')}",
    ]
    return Arm.complete(name, [*_base_overrides(name, seed, folder), *training, *overrides])


def _base_overrides(name: str, seed: int, folder: Path) -> list[str]:
    return [*BASE, *ARCHITECTURES[name].network, f"seed={seed}", f"folder={folder / name}"]
