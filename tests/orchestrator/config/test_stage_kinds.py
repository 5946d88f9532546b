"""The registry of stage kinds is complete, and importing it loads no heavy library."""

import subprocess
import sys
from dataclasses import fields, replace
from inspect import signature
from typing import get_type_hints

import pytest
from pydantic import ValidationError

from ensemble.compression.acceleration.config import TruncateConfig
from ensemble.compression.config import DynamicInt8Config, StitchConfig
from ensemble.compression.distillation.config import (
    ConsistencyConfig,
    MeanFlowConfig,
    MMDConfig,
    SCMConfig,
    SiDConfig,
    SignConfig,
    SpeedUpNetConfig,
)
from ensemble.compression.distillation.consistency import consistency_flops
from ensemble.compression.distillation.mean_flow import mean_flow_flops
from ensemble.compression.distillation.scm import scm_flops
from ensemble.compression.distillation.sid import sid_flops
from ensemble.compression.distillation.sign import sign_flops
from ensemble.compression.distillation.speedup import speedup_flops
from ensemble.compression.pruning.config import LaptopConfig
from ensemble.config import SamplingConfig
from experts.config import CodecConfig, ExpertConfig, TrainingConfig
from orchestrator.config.compute import ComputeConfig, ResourcesConfig, StagesConfig
from orchestrator.config.finetune import FinetuneConfig
from orchestrator.config.hydra_compose import OPTIONAL
from orchestrator.config.schema import RunConfig
from orchestrator.config.stage_kinds import COMPRESSION_KINDS, ENGINE_KINDS, OUR_KINDS, STAGE_KINDS, TRAINING_KINDS
from orchestrator.pipeline.graph import build_graph
from orchestrator.planning.cost_model import DatasetFacts, estimate_work
from orchestrator.planning.dry_run import ExtractorCost
from orchestrator.planning.estimate import training_config
from router.config import RouterConfig, SelectionConfig

AUTO = SamplingConfig(selection=SelectionConfig(name="auto"))

CONFIGS = {
    "distilled": RunConfig(
        baselines=("monolith", "cluster_conditioned", "distilled_monolith"),
        router=RouterConfig(data="samples"),
        distill=SiDConfig(),
        accelerate=TruncateConfig(draft="student"),
        prune=LaptopConfig(),
        quantize=DynamicInt8Config(),
        ensemble=AUTO,
    ),
    "stitched": RunConfig(
        codec=CodecConfig(kind="pca_conv"),
        quantize=DynamicInt8Config(),
        stitch=StitchConfig(),
        experts={1: ExpertConfig(init="/a", init_checksum="x")},
        finetune=FinetuneConfig(images="/images", content="x", experts=(0, 1)),
    ),
}


def dataset_facts(config: RunConfig) -> DatasetFacts:
    cost = ExtractorCost(flops=100.0, fit_flops=10.0, dimension=8)
    return DatasetFacts(
        images=1000,
        held_out=200,
        row_flops={"expert": 1e6, "router": 1e5, "decoder": 1e4},
        extractors={"partition": cost, "score/pixels": cost},
        num_experts=config.partition.num_experts,
        partition=config.partition,
    )


def work_by_name(config: RunConfig):
    return estimate_work(build_graph(config), dataset_facts(config))


@pytest.mark.parametrize("name", STAGE_KINDS)
def test_every_kind_has_config_run_and_estimate(name):
    kind = STAGE_KINDS[name]
    assert list(signature(kind.run).parameters) == ["config", "inputs", "out", "workspace"]
    assert get_type_hints(kind.run)["config"] is kind.config
    assert list(signature(kind.estimate).parameters) == ["stage", "facts", "earlier"]


def test_every_kind_has_resources_in_the_configuration():
    assert {field.name for field in fields(StagesConfig)} == STAGE_KINDS.keys() - {"nothing"}


def test_compression_kinds_are_sections_of_a_run():
    names = [field.name for field in fields(RunConfig) if field.name in COMPRESSION_KINDS]
    assert tuple(names) == COMPRESSION_KINDS == ("distill", "accelerate", "prune", "quantize", "stitch")
    assert set(COMPRESSION_KINDS) < set(OPTIONAL)


@pytest.mark.parametrize("name", sorted(STAGE_KINDS.keys() - {"nothing"}))
def test_trainings_and_engines_may_have_several_workers(name):
    stages = StagesConfig(**{name: ResourcesConfig(workers=2)})
    if name in (*TRAINING_KINDS, *ENGINE_KINDS):
        assert getattr(ComputeConfig(stages=stages).stages, name).workers == 2
    else:
        with pytest.raises(ValidationError, match=f"expert, router, monolith.*stages.{name}"):
            ComputeConfig(stages=stages)


def test_our_kinds_exclude_baselines_and_compressions():
    assert not {"monolith", "cluster_conditioned", "distilled_monolith", *COMPRESSION_KINDS} & set(OUR_KINDS)
    assert {"features", "partition", "expert", "router"} <= set(OUR_KINDS)


def test_the_graphs_here_contain_every_kind():
    kinds = {stage.kind for config in CONFIGS.values() for stage in build_graph(config)}
    assert kinds == STAGE_KINDS.keys() - {"nothing"}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_work_of_every_kind_is_estimated(config):
    work = work_by_name(config)
    for stage in build_graph(config):
        assert isinstance(stage.config, STAGE_KINDS[stage.kind].config)
        assert work[stage.name].flops is not None and work[stage.name].parts is not None
        assert (training_config(stage) is None) == (stage.kind not in TRAINING_KINDS)
        if stage.kind in (*TRAINING_KINDS, *COMPRESSION_KINDS):
            assert work[stage.name].flops > 0


TRAINING = TrainingConfig(steps=10, batch_size=8)
SID, CONSISTENCY = SiDConfig(training=TRAINING), ConsistencyConfig(training=TRAINING)
MEAN_FLOW, SCM = MeanFlowConfig(training=TRAINING), SCMConfig(training=TRAINING, guidance=2)
SIGN, SPEEDUP = SignConfig(training=TRAINING, guidance=2), SpeedUpNetConfig(training=TRAINING)
ROW, ENSEMBLE_ROW = 1e6, 4 * 1e6 + 1e5


@pytest.mark.parametrize(
    ("method", "flops"),
    [
        (SID, 4 * sid_flops(ROW, ROW, SID)),
        (replace(SID, students="shared"), sid_flops(ROW, ENSEMBLE_ROW, SID)),
        (replace(SID, shared_warmup_steps=10), 4 * sid_flops(ROW, ROW, SID) + sid_flops(ROW, ENSEMBLE_ROW, SID)),
        (CONSISTENCY, 4 * consistency_flops(ROW, ROW, CONSISTENCY)),
        (MEAN_FLOW, 4 * mean_flow_flops(ROW, ROW, MEAN_FLOW)),
        (replace(SCM, students="shared"), scm_flops(ROW, ENSEMBLE_ROW, SCM)),
        (SIGN, 4 * sign_flops(ROW, ROW, SIGN)),
        (SPEEDUP, 4 * speedup_flops(ROW, ROW, SPEEDUP)),
        (MMDConfig(training=TRAINING, steps=2), 4 * 80 * (4 * 2 + 3) * ROW),
    ],
)
def test_distillation_counts_the_training_of_students(method, flops):
    distill = work_by_name(RunConfig(distill=method))["distill"]
    comparison = work_by_name(RunConfig(quantize=DynamicInt8Config()))["quantize"]
    assert distill.flops == pytest.approx(flops + comparison.flops)
    assert distill.parts[0].speed == "expert" and distill.parts[0].count == round(flops / 3e6)
    assert distill.parts[1:] == comparison.parts


def test_registry_import_loads_no_heavy_library():
    heavy = ("torch", "ray", "numpy", "pydantic")
    code = f"import sys, orchestrator.config.stage_kinds\nprint([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_stages_import_only_what_they_need():
    unneeded = (
        (("dataset", "features", "partition"), ("diffusers", "torch._dynamo", "sklearn")),
        (
            ("codec", "reference", "router", "expert", "ensemble", "score"),
            ("peft", "diffusers.hooks", "diffusers.models.unets", "scipy.stats"),
        ),
        (sorted(STAGE_KINDS), ("sklearn", "pandas", "ray", "wandb", "matplotlib", "hydra")),
    )
    code = (
        "import sys, orchestrator.run.worker\nfrom orchestrator.config.stage_kinds import STAGE_KINDS\n"
        f"for kinds, heavy in {unneeded!r}:\n"
        "    print([STAGE_KINDS[kind].run for kind in kinds] and [name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n" * 3
