"""Training for `benchmarks.quality`: one run of the pipeline per arm and seed, all in one run folder.

An arm is a list of overrides. Artifacts are identified by their fingerprints, so arms share every stage whose
configuration is equal: all share data, features, partition, codec and reference; two arms that differ only in their
routers share their experts.

Networks that are sampled without a condition are trained without one. With the usual condition dropout of .1 they would
spend nine tenths of their training on conditional predictions. That harms a monolith more than its experts.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.arms.finished_run import SHARED_STAGES, SPACES, FinishedRun, Scores
from data_partition.features.extract import load_extractor
from ddm_core.artifacts import Workspace, read_json, read_manifest
from ensemble.config import SamplingConfig
from ensemble.evaluation.class_probe import ClassProbe
from ensemble.evaluation.evaluate import evaluate
from ensemble.evaluation.feature_space import scale_features
from ensemble.evaluation.held_out_prompts import load_held_out_prompts
from ensemble.evaluation.reference import PROBE
from ensemble.membership import remove_experts
from ensemble.pipeline import EnsemblePipeline
from orchestrator.pipeline.stage_configs import evaluation_config
from router.config import SelectionConfig, selection_label
from router.router import Router

STEPS = 2000
REMOVED_EXPERT = 3
"""The expert that is removed from eight."""

BASE = (
    "data=fashion_full",
    "codec=pca_conv",
    *SHARED_STAGES,
    "expert.network.width=192",
    "expert.network.depth=3",
    f"expert.training.steps={STEPS}",
    "expert.training.batch_size=256",
    "expert.training.lr=2e-3",
    "expert.training.warmup_steps=50",
    "expert.training.weight_decay=0.01",
    "expert.training.condition_dropout=1",
    "router.training.condition_dropout=1",
    "router.width=48",
    "router.training.steps=400",
    "ensemble.steps=20",
    f"scores.spaces=[{','.join(SPACES)}]",
    "scores.num_samples=2048",
    "scores.seed=0",
    "scores.conditional=false",
    "wandb.mode=disabled",
)

SELECTIONS = "scores.selections=[{name: full}, {name: top_k, k: 1}, {name: sticky_resample}]"
GUIDED = (
    "scores.conditional=true",
    "ensemble.guidance_scale=2",
    "expert.training.condition_dropout=0.1",
    "router.training.condition_dropout=0.1",
    "scores.selections=[{name: top_k, k: 1}]",
)

ARMS: Mapping[str, Sequence[str]] = {
    "K = 8": ("baselines=[monolith,cluster_conditioned,distilled_monolith]", SELECTIONS),
    "K = 8, half the steps": (f"expert.training.steps={STEPS // 2}",),
    "K = 2": ("partition.num_experts=2",),
    "K = 4": ("partition.num_experts=4",),
    "K = 16": ("partition.num_experts=16",),
    "K = 8, label clusters": ("partition.by=labels",),
    "K = 8, random clusters": ("partition.by=random",),
    "unbalanced": (
        "partition.features=pixels",
        "partition.num_experts=3",
        "partition.balanced=false",
        "expert.training.batch_size=258",
    ),
    "K = 8, mixed": tuple(f"+experts.{k}.prediction=noise" for k in range(4, 8)),
    "router x 4": ("router.width=100",),
    "router on samples": ("router.data=samples", "scores.selections=[{name: top_k, k: 1}]"),
    "guided": ("baselines=[monolith]", *GUIDED),
    "guided, blind router": (*GUIDED, "router.training.condition_dropout=1"),
    "monolith at the FLOPs of experts and student": (
        "partition.num_experts=1",
        f"expert.training.steps={round(STEPS * 7 / 3)}",
    ),
}
"""Overrides by the arm's name. A student costs the experts, itself, and the experts' predictions as its training data:
1 + 1 + 1/3.
"""


class Arm(FinishedRun):
    """One list of overrides with one seed."""

    def load_scores(self) -> dict[str, Scores]:
        """Return the content of `scores.json` by row."""
        names = [name for name, stage in self.stages.items() if stage.kind == "score"]
        return {name.removeprefix("score_"): read_json(self.artifact_folder(name) / "scores.json") for name in names}

    def sum_flops(self, *kinds: str) -> float:
        """Return the training FLOPs of all stages of these kinds."""
        names = [name for name, stage in self.stages.items() if stage.kind in kinds]
        return sum(read_manifest(self.artifact_folder(name)).flops for name in names)

    def load_router_quality(self) -> Scores:
        """Return the router's accuracy and calibration on held-out latents."""
        return dict(read_json(self.artifact_folder("router") / "quality.json"))

    def measure_class_accuracy(self, images_path: Path) -> float:
        """Return the share of conditional samples that the probe assigns to the class of their condition."""
        reference = self.artifact_folder("reference")
        images = np.load(images_path, allow_pickle=False)
        features = scale_features(load_extractor(reference / "extractors" / PROBE)(images))
        predicted = ClassProbe.load(reference / "probe.safetensors").predict(features)
        prompts = load_held_out_prompts(reference, len(images), self.artifact_folder("ensemble"))
        return float((predicted == np.array(prompts.class_ids)).mean())

    def score_pipeline(self, name: str, pipeline: EnsemblePipeline, sampling: SamplingConfig) -> Path:
        """Score a pipeline that is not a stage of the run and return the folder; finished scores are reused."""
        out = self.run_folder.root / "extra" / f"{name}-seed{self.config.seed}"
        if not (out / "scores.json").exists():
            pipeline.save_pretrained(out / "pipeline")
            evaluate(
                out / "pipeline",
                self.artifact_folder("reference"),
                self.artifact_folder("partition"),
                evaluation_config(self.config),
                sampling,
                out,
                Workspace.at(out / "work"),
            )
        return out


def run_arm(name: str, seed: int, folder: Path, overrides: Sequence[str]) -> Arm:
    """Complete one arm; finished stages are reused."""
    return Arm.complete(name, [*BASE, *ARMS[name], f"seed={seed}", f"folder={folder}", *overrides])


def score_without_expert(arm: Arm) -> Scores:
    """Return the scores of the ensemble without one expert."""
    pipeline = EnsemblePipeline.from_pretrained(arm.artifact_folder("ensemble"))
    remaining = remove_experts(pipeline, [REMOVED_EXPERT])
    return dict(read_json(arm.score_pipeline("lost", remaining, arm.config.ensemble) / "scores.json"))


def score_blind_router(arm: Arm) -> dict[str, tuple[Scores, float]]:
    """Return scores and class accuracy of guided sampling whose gates do not depend on the class."""
    pipeline = EnsemblePipeline.from_pretrained(arm.artifact_folder("ensemble"))
    router = pipeline.ensemble.router
    if not isinstance(router, Router):
        raise TypeError(f"the arm must have a Router; got {type(router).__name__}")
    blind = replace(pipeline, ensemble=replace(pipeline.ensemble, router=blind_router(router)))
    rows: dict[str, tuple[Scores, float]] = {}
    for selection in (SelectionConfig(), *arm.config.scores.selections):
        label = selection_label(selection)
        out = arm.score_pipeline(f"blind_{label}", blind, replace(arm.config.ensemble, selection=selection))
        rows[label] = (dict(read_json(out / "scores.json")), arm.measure_class_accuracy(out / "images.npy"))
    return rows


@torch.no_grad()
def blind_router(router: Router) -> Router:
    """Return a router that computes p(k | x, t), and p(k) for the prior, for every condition."""
    model = deepcopy(router.model)
    class_embeddings = model.get_submodule("embedding.of_class").get_parameter("weight")
    class_embeddings.copy_(class_embeddings[-1].expand_as(class_embeddings).clone())
    return replace(
        router,
        model=model,
        prior_counts=router.prior_counts[-1:].expand_as(router.prior_counts).clone(),
        temperatures=router.temperatures[-1:].expand_as(router.temperatures).clone(),
    )
