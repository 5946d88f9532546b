"""Analyses of a finished run on demand: an audit of samples, and a classifier made of experts.

Each is a stage outside the graph. It runs in this process, writes its artifact next to the others, and runs only once.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ddm_core.artifacts import publish, read_json, verify
from ensemble.config import AuditConfig, ClassifierConfig
from orchestrator.config.schema import RunConfig
from orchestrator.errors import ConfigError, RunFolderError
from orchestrator.pipeline.graph import FROM_ENSEMBLE
from orchestrator.pipeline.stage import Input, Stage
from orchestrator.reporting.results import current_graph
from orchestrator.run.disk_errors import disk_errors_as_messages
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.trust import require_plain_files

ProgressCallback = Callable[[int, int], None]
WriteArtifact = Callable[[Path], float]


def audit_stage(score: Stage) -> Stage:
    """Return the stage that audits the samples of one row of the table of scores."""
    config = AuditConfig(selection=score.config.sampling.selection, conditional=score.config.evaluation.conditional)
    dataset = score.inputs["reference"].stage.inputs["dataset"]
    inputs = {"score": Input(stage=score), "dataset": dataset} | dict(score.inputs)
    return Stage(name=score.name.replace("score", "audit", 1), kind="audit", config=config, inputs=inputs)


def finished_audits(run: RunFolder, graph: Sequence[Stage]) -> list[Stage]:
    """Return the finished audits."""
    return [audit for audit in map(audit_stage, _scores(graph)) if run.is_finished(audit)]


def run_audit(run: RunFolder, row: str, on_progress: ProgressCallback) -> Stage:
    """Audit the samples of a row (by default the default selection's), and return the finished stage.

    Raises `ConfigError` for an unknown row, and `RunFolderError` if its score is not finished.
    """
    scores = _scores(current_graph(run, run.load_config()))
    names = [score.name.removeprefix("score_") for score in scores]
    if row and row not in names:
        raise ConfigError(f"--row {row!r} is not a row of the table of scores; known: {', '.join(names)}")
    score = scores[names.index(row) if row else 0]
    if not run.is_finished(score):
        raise RunFolderError(f"{run.root} has no finished {score.name}; finish the run with `ddm resume {run.root}`")
    audit = audit_stage(score)

    def write(out: Path) -> float:
        from ensemble.analysis.memorization import audit_samples

        folders = {role: run.input_folder(source) for role, source in audit.inputs.items()}
        for role in ("score", "ensemble", "partition", "reference"):
            verify(folders[role])
        samples = _load_samples(folders, audit.config)
        audit_samples(
            samples, folders["dataset"], folders["partition"], folders["reference"], audit.config, out, on_progress
        )
        return 0.0

    _publish(run, audit, write)
    return audit


def run_classify(
    run: RunFolder,
    config: RunConfig,
    images: int,
    noises_per_image: int,
    on_progress: ProgressCallback,
    elimination: float | None = None,
) -> Stage:
    """Classify held-out images with the configuration's ensemble and with each expert alone; return the finished stage.

    Raises `RunFolderError` if the ensemble or the partition is not finished.
    """
    graph = {stage.name: stage for stage in current_graph(run, config)}
    names = {"ensemble": FROM_ENSEMBLE if config.from_ensemble else "ensemble", "partition": "partition"}
    needed = {role: Input(stage=graph[name]) for role, name in names.items()}
    if unfinished := [role for role, source in needed.items() if not run.is_finished(source.stage)]:
        raise RunFolderError(
            f"{run.root} has no finished {' and '.join(unfinished)}; finish the run with `ddm resume {run.root}`"
        )
    stage = Stage(
        name="classify",
        kind="classify",
        config=ClassifierConfig(images=images, noises_per_image=noises_per_image, elimination=elimination),
        inputs=needed,
    )

    def write(out: Path) -> float:
        from ensemble.analysis.diffusion_classifier import classify
        from ensemble.pipeline import EnsemblePipeline

        verify(run.input_folder(needed["ensemble"]))
        pipeline = EnsemblePipeline.from_pretrained(run.input_folder(needed["ensemble"]))
        return classify(pipeline, run.input_folder(needed["partition"]), stage.config, out, on_progress)

    _publish(run, stage, write)
    return stage


def load_result(run: RunFolder, stage: Stage, file: str) -> dict[str, Any]:
    """Return what a finished analysis wrote, after its checksum is verified."""
    return dict(read_json(run.verify_file(stage, file)))


def _scores(graph: Sequence[Stage]) -> list[Stage]:
    return [stage for stage in graph if stage.kind == "score"]


def _publish(run: RunFolder, stage: Stage, write: WriteArtifact) -> None:
    require_plain_files(run)
    with disk_errors_as_messages(run.root):
        publish(run.artifact(stage), write, stage=stage.name, config=stage.config, inputs=stage.input_fingerprints)


def _load_samples(folders: dict[str, Path], config: AuditConfig) -> Any:
    """Return the samples of a finished score, and the expert that generated each."""
    from ensemble.analysis.memorization import AuditedSamples, pinned_experts
    from ensemble.evaluation.held_out_prompts import load_held_out_prompts
    from ensemble.evaluation.selection_search import read_choice
    from ensemble.pipeline import EnsemblePipeline

    images, seeds = (np.load(folders["score"] / f"{name}.npy", allow_pickle=False) for name in ("images", "seeds"))
    if "selection_search" in folders:
        config = replace(config, selection=read_choice(folders["selection_search"]).selection)
    pipeline = EnsemblePipeline.from_pretrained(folders["ensemble"])
    condition = None
    if config.conditional:
        condition = pipeline.condition(load_held_out_prompts(folders["reference"], len(seeds), folders["ensemble"]))
    experts = pinned_experts(pipeline.ensemble, seeds.tolist(), condition, config.selection)
    return AuditedSamples(images=images, seeds=seeds, experts=experts, codec=pipeline.codec)
