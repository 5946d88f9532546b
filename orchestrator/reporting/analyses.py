"""What a person may ask of a finished run: an audit of samples, a classifier made of experts.

Each is a stage that no graph has: it runs in this process, its artifact lies beside the others, and asking again does
nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ddm_core.artifacts import publish, read_json, verify
from ensemble.config import AuditConfig, ClassifierConfig
from orchestrator.errors import ConfigError, RunFolderError
from orchestrator.pipeline.stage import Input, Stage
from orchestrator.reporting.results import current_graph
from orchestrator.run.run_folder import RunFolder

Progress = Callable[[int, int], None]
Fill = Callable[[Path], float]


def audit_stage(score: Stage) -> Stage:
    """The audit of the samples of one row of the table of scores."""
    config = AuditConfig(selection=score.config.sampling.selection, conditional=score.config.evaluation.conditional)
    dataset = score.inputs["reference"].stage.inputs["dataset"]
    inputs = {"score": Input(stage=score), "dataset": dataset} | dict(score.inputs)
    return Stage(name=score.name.replace("score", "audit", 1), kind="audit", config=config, inputs=inputs)


def finished_audits(run: RunFolder, graph: Sequence[Stage]) -> list[Stage]:
    """The audits that were asked for so far."""
    return [audit for audit in map(audit_stage, _scores(graph)) if run.finished(audit)]


def run_audit(run: RunFolder, row: str, on_progress: Progress) -> Stage:
    """Audit the samples of a row, the default selection's if it is empty; returns the finished stage."""
    scores = _scores(current_graph(run, run.load_config()))
    names = [score.name.removeprefix("score_") for score in scores]
    if row and row not in names:
        raise ConfigError(f"--row {row!r} is not a row of the table of scores; known: {', '.join(names)}")
    score = scores[names.index(row) if row else 0]
    if not run.finished(score):
        raise RunFolderError(f"{run.root} has no finished {score.name}; finish the run with `ddm resume {run.root}`")
    audit = audit_stage(score)

    def fill(out: Path) -> float:
        from ensemble.analysis.memorization import audit_samples

        folders = {role: run.input(given) for role, given in audit.inputs.items()}
        for role in ("score", "ensemble", "partition", "reference"):
            verify(folders[role])
        samples = _samples(folders, audit.config)
        audit_samples(
            samples, folders["dataset"], folders["partition"], folders["reference"], audit.config, out, on_progress
        )
        return 0.0

    _publish(run, audit, fill)
    return audit


def run_classify(run: RunFolder, images: int, draws: int, on_progress: Progress) -> Stage:
    """Classify held-out images through the ensemble and through each expert alone; returns the finished stage."""
    graph = {stage.name: stage for stage in current_graph(run, run.load_config())}
    needed = {name: Input(stage=graph[name]) for name in ("ensemble", "partition")}
    if unfinished := [name for name, given in needed.items() if not run.finished(given.stage)]:
        raise RunFolderError(
            f"{run.root} has no finished {' and '.join(unfinished)}; finish the run with `ddm resume {run.root}`"
        )
    stage = Stage(
        name="classify", kind="classify", config=ClassifierConfig(images=images, noises_per_image=draws), inputs=needed
    )

    def fill(out: Path) -> float:
        from ensemble.analysis.diffusion_classifier import classify
        from ensemble.pipeline import DDMPipeline

        verify(run.input(needed["ensemble"]))
        pipeline = DDMPipeline.from_pretrained(run.input(needed["ensemble"]))
        return classify(pipeline, run.input(needed["partition"]), stage.config, out, on_progress)

    _publish(run, stage, fill)
    return stage


def load_result(run: RunFolder, stage: Stage, file: str) -> dict[str, Any]:
    """What a finished examination wrote, once it has been compared with its checksum."""
    return dict(read_json(run.checked(stage, file)))


def _scores(graph: Sequence[Stage]) -> list[Stage]:
    return [stage for stage in graph if stage.kind == "score"]


def _publish(run: RunFolder, stage: Stage, fill: Fill) -> None:
    publish(run.artifact(stage), fill, stage=stage.name, config=stage.config, inputs=stage.input_fingerprints)


def _samples(folders: dict[str, Path], config: AuditConfig) -> Any:
    """The samples of a finished score, and which expert made each."""
    from ensemble.analysis.memorization import AuditedSamples, drawn_experts
    from ensemble.evaluation.evaluate import held_out_classes
    from ensemble.evaluation.selection_search import read_choice
    from ensemble.pipeline import DDMPipeline

    images, seeds = (np.load(folders["score"] / f"{name}.npy", allow_pickle=False) for name in ("images", "seeds"))
    if "selection_search" in folders:
        config = replace(config, selection=read_choice(folders["selection_search"]).selection)
    pipeline = DDMPipeline.from_pretrained(folders["ensemble"])
    class_ids = held_out_classes(folders["reference"], len(seeds)) if config.conditional else None
    experts = drawn_experts(pipeline.ensemble, seeds.tolist(), class_ids, config.selection)
    return AuditedSamples(images=images, seeds=seeds, experts=experts, codec=pipeline.codec)
