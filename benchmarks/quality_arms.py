"""What `benchmarks.quality` trains: one run of the pipeline for each arm and seed, all in one run folder.

An arm is a list of overrides. Artifacts are found by their fingerprints, so arms share whatever they agree about: data,
features, partition, codec and reference of all, the experts of two arms that differ in their routers alone.

Networks that are sampled without a condition are trained without one. With the usual condition dropout of .1 they would
have spent nine tenths of their training on something else, and a monolith suffers more from that than its experts do.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.finished_run import SPACES, FinishedRun, Scores
from data_partition.features.extract import load_extractor
from ddm_core.artifacts import Workspace, read_json, read_manifest
from ensemble.config import SamplingConfig
from ensemble.evaluation.class_probe import ClassProbe
from ensemble.evaluation.evaluate import evaluate, held_out_classes
from ensemble.evaluation.feature_space import scaled
from ensemble.evaluation.reference import PIXELS
from ensemble.membership import without_experts
from ensemble.pipeline import DDMPipeline
from orchestrator.pipeline.graph import plain_evaluation
from router.config import SelectionConfig, selection_label
from router.router import Router

STEPS = 2000
LOST = 3
"""The expert that is taken out of eight."""

BASE = (
    "data=fashion_full",
    "codec=pca_conv",
    "codec.decoder_training.seed=0",
    "partition.features=random_conv",
    "partition.num_fine=128",
    "partition.iterations=10",
    "partition.num_experts=8",
    "partition.seed=0",
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
    "monolith=false",
    "wandb.mode=disabled",
)

SELECTIONS = "scores.selections=[{name: full}, {name: top_k, k: 1}, {name: redraw}]"
GUIDED = (
    "scores.conditional=true",
    "ensemble.guidance_scale=2",
    "expert.training.condition_dropout=0.1",
    "router.training.condition_dropout=0.1",
    "scores.selections=[{name: top_k, k: 1}]",
)

ARMS: Mapping[str, Sequence[str]] = {
    "K = 8": ("monolith=true", "baselines=[cluster_conditioned,distilled_monolith]", SELECTIONS),
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
    "guided": ("monolith=true", *GUIDED),
    "guided, blind router": (*GUIDED, "router.training.condition_dropout=1"),
    "monolith at the FLOPs of experts and student": (
        "partition.num_experts=1",
        f"expert.training.steps={round(STEPS * 7 / 3)}",
    ),
}
"""Overrides by the arm's name. A student costs the experts, itself, and their answers to train on: 1 + 1 + 1/3."""


class Arm(FinishedRun):
    """One list of overrides with one seed."""

    def scores(self) -> dict[str, Scores]:
        """`scores.json` by row."""
        names = [name for name, stage in self.stages.items() if stage.kind == "score"]
        return {name.removeprefix("score_"): read_json(self.folder(name) / "scores.json") for name in names}

    def flops(self, *kinds: str) -> float:
        """Training FLOPs of all stages of these kinds."""
        names = [name for name, stage in self.stages.items() if stage.kind in kinds]
        return sum(read_manifest(self.folder(name)).flops for name in names)

    def quality(self) -> Scores:
        """The router's accuracy and calibration on held-out latents."""
        return dict(read_json(self.folder("router") / "quality.json"))

    def class_accuracy(self, images: Path) -> float:
        """Share of conditional samples in which the probe sees the class that was asked for."""
        reference = self.folder("reference")
        drawn = np.load(images, allow_pickle=False)
        seen = ClassProbe.load(reference / "probe.safetensors").predict(
            scaled(load_extractor(reference / "extractors" / PIXELS)(drawn))
        )
        return float((seen == np.array(held_out_classes(reference, len(drawn)))).mean())

    def scored(self, name: str, pipeline: DDMPipeline, sampling: SamplingConfig) -> Path:
        """A folder with the scores of a pipeline that is no stage of the run; one that is there is not made again."""
        seed = self.config.seed
        out = self.run.root / "extra" / f"{name}-seed{seed}"
        if not (out / "scores.json").exists():
            pipeline.save_pretrained(out / "pipeline")
            evaluate(
                out / "pipeline",
                self.folder("reference"),
                self.folder("partition"),
                plain_evaluation(self.config),
                sampling,
                out,
                Workspace.at(out / "work"),
            )
        return out


def run_arm(name: str, seed: int, folder: Path, overrides: Sequence[str]) -> Arm:
    """Bring one arm to its end; what is finished already is found."""
    return Arm.of(name, [*BASE, *ARMS[name], f"seed={seed}", f"folder={folder}", *overrides])


def lost_expert(arm: Arm) -> Scores:
    """Scores of the ensemble with one expert missing."""
    pipeline = DDMPipeline.from_pretrained(arm.folder("ensemble"))
    left = without_experts(pipeline, [LOST])
    return dict(read_json(arm.scored("lost", left, arm.config.ensemble) / "scores.json"))


def blind_rows(arm: Arm) -> dict[str, tuple[Scores, float]]:
    """Scores and class accuracy of guided sampling whose gates never see the class."""
    pipeline = DDMPipeline.from_pretrained(arm.folder("ensemble"))
    router = pipeline.ensemble.router
    if not isinstance(router, Router):
        raise TypeError(f"the arm has a {type(router).__name__} where its router should be")
    blind = replace(pipeline, ensemble=replace(pipeline.ensemble, router=blinded(router)))
    rows: dict[str, tuple[Scores, float]] = {}
    for selection in (SelectionConfig(), *arm.config.scores.selections):
        sampling = replace(arm.config.ensemble, selection=selection)
        out = arm.scored(f"blind_{selection_label(selection)}", blind, sampling)
        rows[selection_label(selection)] = (
            dict(read_json(out / "scores.json")),
            arm.class_accuracy(out / "images.npy"),
        )
    return rows


@torch.no_grad()
def blinded(router: Router) -> Router:
    """The router that answers p(k | x, t), and p(k) for the prior, whatever the condition is."""
    model = deepcopy(router.model)
    classes = model.get_submodule("embedding.of_class").get_parameter("weight")
    classes.copy_(classes[-1].expand_as(classes).clone())
    return replace(
        router,
        model=model,
        prior_counts=router.prior_counts[-1:].expand_as(router.prior_counts).clone(),
        temperatures=router.temperatures[-1:].expand_as(router.temperatures).clone(),
    )
