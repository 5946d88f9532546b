"""The stages that sample and score: ensembles, the reference, scores, the search for a selection."""

from dataclasses import replace
from pathlib import Path

from data_partition.shards.shards import read_index
from ddm_core.artifacts import Workspace
from ensemble.analysis.replication import check_replication
from ensemble.config import EvaluationConfig, ExpertSamplesConfig, ReplicationLimits, SamplingConfig
from ensemble.evaluation.evaluate import evaluate
from ensemble.evaluation.reference import build_reference
from ensemble.evaluation.selection_search import read_choice, search_selection
from ensemble.pipeline import assemble
from ensemble.sampling.expert_samples import sample_expert_latents
from experts.conditions.text_encoder import read_text_config
from orchestrator.errors import RunFolderError
from orchestrator.pipeline.stage_configs import EnsembleStageConfig, ScoreStageConfig, SelectionSearchStageConfig
from orchestrator.pipeline.stage_inputs import Inputs, experts_by_id


def run_expert_samples(config: ExpertSamplesConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Generate latents with the experts, for a router that trains without data."""
    return sample_expert_latents(experts_by_id(inputs), inputs["partition"], config, out, workspace)


def run_ensemble(config: EnsembleStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Assemble trained experts and the router into one pipeline folder."""
    if config.content:
        raise RunFolderError("the run has lost its copy of the changed ensemble; name its folder with --ensemble again")
    experts = (
        dict.fromkeys(config.expert_ids, inputs["cluster_conditioned"])
        if "cluster_conditioned" in inputs
        else experts_by_id(inputs)
    )
    missing = [k for k in config.expert_ids if k not in experts]
    text = read_text_config(inputs["text"]) if "text" in inputs else None
    class_names = read_index(inputs["shards"]).class_names if text is None or text.classes else ()
    assemble(experts, inputs.get("router"), inputs["codec"], out, missing, class_names, text)
    return 0.0


def run_reference(config: EvaluationConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Compute the reference statistics that all scores share, of real images and of the codec."""
    return build_reference(inputs["dataset"], inputs["codec"], config, out, workspace).flops


def run_score(config: ScoreStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Sample the ensemble and score the samples; a selection search replaces the selection."""
    folders, sampling = (inputs["ensemble"], inputs["reference"], inputs["partition"]), config.sampling
    if "selection_search" in inputs:
        choice = read_choice(inputs["selection_search"])
        reflection = sampling.reflection if choice.reflects else None
        sampling = replace(sampling, selection=choice.selection, reflection=reflection)
    sampling = with_weak_folder(sampling, inputs.get("weak"))
    flops = evaluate(*folders, config.evaluation, sampling, out, workspace).flops
    if config.limits != ReplicationLimits():
        check_replication(out, *folders, config.evaluation, config.limits)
    return flops


def run_selection_search(config: SelectionSearchStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Try the candidate selections and choose one."""
    folders = (inputs["ensemble"], inputs["reference"])
    sampling = with_weak_folder(config.sampling, inputs.get("weak"))
    return search_selection(*folders, config.search, config.evaluation, sampling, out, workspace)


def with_weak_folder(sampling: SamplingConfig, monolith: Path | None) -> SamplingConfig:
    """Return the sampling with the folder of the run's monolith, if that is the weak model of its reflection."""
    if monolith is None or sampling.reflection is None:
        return sampling
    return replace(sampling, reflection=replace(sampling.reflection, weak="folder", path=str(monolith)))
