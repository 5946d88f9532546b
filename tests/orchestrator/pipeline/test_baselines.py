"""Different experts and further baselines: dependencies in the graph, and two complete runs."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ddm_core.artifacts import read_json, read_manifest
from ensemble.pipeline import EnsemblePipeline
from experts.architectures.residual_mlp import ResidualMLP
from experts.config import DistilledMonolithConfig, ExpertConfig, ResidualMLPConfig
from experts.expert import Expert
from experts.networks.model_io import save_model
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import RunConfig, parse_config
from orchestrator.controller import run_pipeline
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import remove_stage
from orchestrator.pipeline.stage_inputs import experts_by_id
from orchestrator.reporting.results import load_score_rows, load_training_flops
from orchestrator.run.run_folder import RunFolder

MONOLITH = RunConfig(baselines=("monolith",))
ALL_BASELINES = RunConfig(baselines=("monolith", "cluster_conditioned", "distilled_monolith"))


def stages_by_name(config):
    return {stage.name: stage for stage in build_graph(config)}


def changed_by(before, after):
    old = stages_by_name(before)
    return {
        name
        for name, stage in stages_by_name(after).items()
        if name not in old or old[name].fingerprint != stage.fingerprint
    }


def with_router(config, **changes):
    return replace(config, router=replace(config.router, **changes))


def test_different_expert_changes_itself_and_its_dependents():
    expert = ExpertConfig(prediction="noise", noise_schedule="cosine")
    after = RunConfig(experts={1: expert})
    assert changed_by(RunConfig(), after) == {"expert_1", "ensemble", "score_sticky"}
    assert stages_by_name(after)["expert_1"].config.expert.prediction == "noise"


def test_larger_expert_gives_the_monolith_more_steps():
    after = replace(MONOLITH, experts={1: ExpertConfig(network=ResidualMLPConfig(width=512))})
    assert "monolith" in changed_by(MONOLITH, after)
    costs = stages_by_name(after)["monolith"].config.experts
    assert [cost.network.width for cost in costs] == [448, 512, 448, 448]
    assert {cost.training.batch_size for cost in costs} == {60}
    other_prediction = replace(after, experts={1: replace(after.experts[1], prediction="clean")})
    assert changed_by(after, other_prediction) == {"expert_1", "ensemble", "score_sticky"}


def test_baselines_change_no_existing_stage():
    added = {f"{kind}{name}" for name in ("cluster_conditioned", "distilled_monolith") for kind in ("", "score_")}
    assert changed_by(MONOLITH, ALL_BASELINES) == added | {
        "cluster_conditioned_ensemble",
        "distilled_monolith_ensemble",
    }
    graph = stages_by_name(ALL_BASELINES)
    assert graph["cluster_conditioned"].config == graph["monolith"].config
    assert set(graph["cluster_conditioned_ensemble"].inputs) == {"codec", "shards", "cluster_conditioned", "router"}
    assert graph["score_cluster_conditioned"].config.sampling.selection.name == "sticky"
    assert {f"expert_{k}" for k in range(4)} <= set(graph["distilled_monolith"].inputs)
    assert "router" not in graph["distilled_monolith"].inputs


def test_distilled_monolith_has_settings_and_skips_lost_teacher():
    config = replace(ALL_BASELINES, distilled_monolith=DistilledMonolithConfig(from_expert=1, steps=7, batch_size=60))
    student = stages_by_name(config)["distilled_monolith"]
    assert (student.config.expert.training.steps, student.config.expert.training.batch_size) == (7, 60)
    assert student.inputs["init"].stage.name == "expert_1"
    assert changed_by(ALL_BASELINES, config) == {
        "distilled_monolith",
        "distilled_monolith_ensemble",
        "score_distilled_monolith",
    }
    remaining = {stage.name: stage for stage in remove_stage(build_graph(config), "expert_1")}["distilled_monolith"]
    assert "init" not in remaining.inputs and "expert_1" not in remaining.inputs
    assert "expert_0" in remaining.inputs


def test_distilled_monolith_may_start_from_the_mean_of_experts():
    config = replace(ALL_BASELINES, distilled_monolith=DistilledMonolithConfig(from_mean=True))
    assert "distilled_monolith" in changed_by(ALL_BASELINES, config)
    assert stages_by_name(config)["distilled_monolith"].config.from_mean
    with pytest.raises(ValueError, match=r"from_mean=true starts from all experts; leave from_expert=1 out"):
        DistilledMonolithConfig(from_mean=True, from_expert=1)


def test_samples_of_the_experts_are_no_expert():
    inputs = {role: Path(role) for role in ("expert_0", "expert_12", "expert_samples", "codec", "7")}
    assert experts_by_id(inputs) == {0: Path("expert_0"), 12: Path("expert_12")}


def test_router_without_data_reads_samples_of_the_experts():
    after = with_router(MONOLITH, data="samples")
    graph = stages_by_name(after)
    assert {artifact.stage.name for artifact in graph["expert_samples"].inputs.values()} == {
        "partition",
        *(f"expert_{k}" for k in range(4)),
    }
    assert set(graph["router"].inputs) == {"codec", "expert_samples", "holdouts"}
    names = list(graph)
    assert names.index("expert_3") < names.index("expert_samples") < names.index("router") < names.index("ensemble")
    changed = changed_by(MONOLITH, after)
    assert changed == {
        "expert_samples",
        "router",
        "ensemble",
        "score_sticky",
        "monolith",
        "monolith_ensemble",
        "score_monolith",
    }
    assert changed_by(RunConfig(), with_router(RunConfig(), sample_steps=5)) >= {"router"}


def test_checkpoint_is_copied_once_and_changes_the_experts():
    def config(checksum, **sections):
        expert = ExpertConfig(init="/a", init_checksum=checksum)
        return RunConfig(expert=expert, monolith=True, **sections)

    graph = stages_by_name(config("x"))
    assert [name for name, stage in graph.items() if stage.kind == "init"] == ["init_0"]
    for name in ("expert_0", "expert_3", "monolith"):
        assert graph[name].inputs["init"].stage.name == "init_0"
        assert graph[name].config.expert.init is None
    changed = changed_by(config("x"), config("y"))
    assert {"init_0", "expert_0", "monolith"} <= changed and changed.isdisjoint({"router", "partition", "codec"})
    graph = stages_by_name(config("x", experts={2: ExpertConfig(init="/b", init_checksum="z")}))
    assert graph["expert_2"].inputs["init"].stage.name == graph["monolith"].inputs["init_2"].stage.name == "init_1"


TINY = (
    "experiment=digits",
    "compute=inline",
    "compute.backoff_s=0",
    "wandb.mode=disabled",
    "data.limit=200",
    "expert.training.steps=6",
    "expert.training.batch_size=8",
    "expert.network.width=16",
    "router.training.steps=4",
    "router.width=8",
    "scores.num_samples=16",
    "scores.components=4",
    "scores.spaces=[pixels]",
    "codec.components=4",
    "ensemble.steps=2",
)


def run_tiny(folder, *overrides):
    config = parse_config(compose([*TINY, f"folder={folder}", *overrides]))
    run_pipeline(config, Console(file=io.StringIO()))
    run = RunFolder(folder)
    return run, build_graph(config), {stage.name: run.artifact(stage) for stage in build_graph(config)}


@pytest.mark.integration
def test_run_with_all_baselines_and_router_without_data(tmp_path):
    run, graph, artifacts = run_tiny(
        tmp_path / "run",
        "experts.1.prediction=noise",
        "experts.1.network.width=128",
        "baselines=[monolith,cluster_conditioned,distilled_monolith]",
        "router.data=samples",
        "router.samples_per_expert=12",
    )
    assert {row.name for row in load_score_rows(run, graph)} == {
        "sticky",
        "monolith",
        "cluster_conditioned",
        "distilled_monolith",
    }
    flops = load_training_flops(run, graph)
    our_flops = sum(value for name, value in flops.items() if name != "monolith")
    step_flops = flops["monolith"] / read_json(artifacts["monolith"] / "training.json")["steps"]
    assert abs(our_flops - flops["monolith"]) <= 0.51 * step_flops
    assert read_manifest(artifacts["cluster_conditioned"]).flops == flops["monolith"]
    assert flops["expert_1"] > flops["expert_0"]
    experts = EnsemblePipeline.from_pretrained(artifacts["ensemble"]).ensemble.experts
    assert [experts[k].prediction for k in (0, 1)] == ["velocity", "noise"]
    counts = read_json(artifacts["distilled_monolith"] / "distilled_monolith.json")
    assert counts["experts"] == flops["expert_0"] + flops["expert_1"]
    assert read_manifest(artifacts["distilled_monolith"]).flops == counts["student"] + counts["teachers"]
    assert len(list((artifacts["cluster_conditioned_ensemble"]).glob("*/diffusion_pytorch_model.safetensors"))) == 2


@pytest.mark.slow
def test_run_starts_from_a_pretrained_checkpoint(tmp_path):
    torch.manual_seed(0)
    save_model(ResidualMLP(latent_shape=[4], num_classes=10, width=24, depth=1), tmp_path / "model")
    overrides = (f"expert.init={tmp_path / 'model'}", "experts.1.init_loss=converted", "scores.selections=[]")
    _, _, artifacts = run_tiny(tmp_path / "run", *overrides)
    for name in ("expert_0", "expert_1", "monolith"):
        expert = Expert.load(artifacts[name])
        assert (expert.prediction, expert.noise_schedule.name, expert.model.config.width) == (
            "noise",
            "ddpm_linear",
            24,
        )
