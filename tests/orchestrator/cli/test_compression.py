"""`ddm compress`: a compressed ensemble next to the original one of a finished run, by stages of the graph."""

from pathlib import Path

import pytest
from rich.console import Console

from ddm_core.artifacts import read_json
from ensemble.pipeline import EnsemblePipeline
from orchestrator.cli.compress import compress_run, describe_compression, with_compression
from orchestrator.cli.sample import SamplingOptions, prepare_sampling
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import RunConfig, parse_config
from orchestrator.controller import run_pipeline
from orchestrator.errors import ConfigError
from orchestrator.pipeline.graph import build_graph
from orchestrator.planning.compression_bounds import least_ratios
from orchestrator.reporting.pareto import load_compression_points
from orchestrator.reporting.results import current_graph, load_score_rows
from orchestrator.run.run_folder import RunFolder
from orchestrator.ui.report import write_report

TINY = (
    "experiment=digits",
    "compute=inline",
    "data.limit=400",
    "expert.training.steps=40",
    "expert.network.width=64",
    "router.training.steps=40",
    "scores.num_samples=64",
    "ensemble.steps=4",
    "ensemble.solver=euler",
    "monolith=false",
)


REFLECTED = ("ensemble.reflection.steps=2", "expert.training.early_checkpoint=0.5")


def test_graph_with_quantize_only_adds_stages():
    original, compressed = (
        {stage.name: stage.fingerprint for stage in build_graph(parse_config(compose(overrides)))}
        for overrides in (["experiment=digits"], ["experiment=digits", "quantize=int4_weight_only"])
    )
    assert compressed.keys() - original.keys() == {"quantize", "score_int4_weight_only", "timing_int4_weight_only"}
    assert {name: compressed[name] for name in original} == original


def test_graph_with_auto_shares_one_selection_search():
    config = parse_config(compose(["experiment=digits", "quantize=int8_weight_only", "ensemble=auto"]))
    stages = {stage.name: stage for stage in build_graph(config)}
    assert (
        stages["score_int8_weight_only"].inputs["selection_search"].stage
        is stages["score_auto"].inputs["selection_search"].stage
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantize=int3_weight_only"], "quantize must be one of int4_dynamic, int4_weight_only"),
        (["quantize=null"], "quantize must be one of int4_dynamic, int4_weight_only"),
        (["expert.noise_schedule=cosine"], "must belong to distill, accelerate, prune, quantize, stitch; got expert"),
        (["quantize=int4_weight_only", "quantize.bits=7"], r"quantize\.weight_only\.bits"),
        (
            ["quantize=int4_weight_only", "quantize.bit=4"],
            r"quantize\.weight_only\.bit: unknown key; known here: bits, group_size",
        ),
        (["prune=laptop", "prune.finetune.step=4"], r"finetune\.step: unknown key; known here: .*steps"),
        (["quantize.bits=4"], "quantize: the method is missing"),
        (["distill=sid", "accelerate=cache"], "remove distill or accelerate"),
        (["accelerate=base_first"], "after the first step; add distill"),
        (["accelerate=truncate", "accelerate.draft=student"], "which generate the draft; add distill"),
        (["distill=sid", "accelerate=truncate"], "students of distill would not be used"),
        (["distill=sid", "stitch=small_late"], "remove stitch"),
        (["accelerate=truncate", "stitch=small_late"], "remove stitch"),
        (["distill=sid", "distill.students=shared", "accelerate=base_first"], "set distill.students=per_expert"),
        (["distill=sid", "distill.students=shared", "distill.shared_warmup_steps=3"], "set distill.training.steps"),
        (["distill=mmd", "prune=ecodiff"], "set prune=laptop"),
        (["accelerate=truncate", "quantize=mixed_precision"], "set quantize to another method"),
        (["accelerate=taylorseer", "prune=laptop"], "set accelerate=cache"),
        (["accelerate=taylorseer", "stitch=small_late"], "diffusers' hooks they cannot"),
        ([], "needs at least one stage; write for example quantize=int8_weight_only"),
    ],
)
def test_with_compression_invalid_override_names_remedy(overrides, message):
    with pytest.raises(ConfigError, match=message):
        with_compression(RunConfig(), overrides)


def test_with_compression_students_reject_reflection():
    reflected = parse_config(compose(["experiment=digits", *REFLECTED]))
    with pytest.raises(ConfigError, match=r"remove ensemble\.reflection$"):
        with_compression(reflected, ["distill=sid"])


@pytest.mark.slow
def test_compress_finished_run_scores_and_reuses_result(tmp_path):
    config = parse_config(compose([*TINY, f"folder={tmp_path}"]))
    first = run_pipeline(config, Console(quiet=True))
    run = RunFolder(Path(config.folder))
    compressed = with_compression(run.load_config(), ["quantize=int4_weight_only", "quantize.group_size=16"])
    result = run_pipeline(compressed, Console(quiet=True))
    assert (
        set(result.finished) - set(first.finished) == {"quantize", "score_int4_weight_only", "timing_int4_weight_only"}
        and result.submitted == 3
    )
    assert run_pipeline(compressed, Console(quiet=True)).submitted == 0

    rows = {row.name: row.scores for row in load_score_rows(run, current_graph(run, compressed))}
    description = describe_compression(run, compressed)
    folder = Path(description.splitlines()[0])
    report = read_json(folder / "compression.json")
    assert report["bytes_after"] < 0.5 * report["bytes_before"]
    assert rows["int4_weight_only"]["spaces"].keys() == rows["sticky"]["spaces"].keys()
    assert EnsemblePipeline.from_pretrained(folder).ensemble.num_experts == compressed.partition.num_experts

    again = with_compression(run.load_config(), ["prune=ecodiff", "prune.mask_training.steps=4", "stitch=small_early"])
    assert compress_run(run, again, Console(quiet=True)).quantize is None
    points = {point.name: point for point in load_compression_points(run, build_graph(compressed))}
    assert points.keys() == {"int4_weight_only", "ecodiff", "ecodiff + stitch"}
    assert (
        least_ratios(compressed)["bytes"] < points["int4_weight_only"].bytes
        and points["int4_weight_only"].bytes == report["bytes_after"] / report["bytes_before"]
        and points["int4_weight_only"].flops == 1
    )
    assert points["ecodiff"].flops < points["ecodiff + stitch"].flops < 1
    assert all(point.cpu and point.kid is not None and point.fd for point in points.values())
    page = write_report(run).read_text()
    assert "Compressed ensembles" in page and "ecodiff + stitch" in page


DISTILLED = (
    "distill=sid",
    "distill.training.steps=4",
    "distill.shared_warmup_steps=3",
    "accelerate=base_first",
    "prune=laptop",
    "prune.ratio=0.1",
    "prune.finetune.steps=4",
    "quantize=int8_dynamic",
)
DRAFTED = (
    "accelerate=truncate",
    "accelerate.rows=32",
    "accelerate.t_start=0.5",
    "quantize=int4_weight_only",
)
DENSE = ("distill=consistency", "distill.students=shared", "distill.teacher=true", "distill.training.steps=4")
DENSE_SID = ("distill=sid", "distill.students=shared", "distill.training.steps=3", "quantize=int8_weight_only")
CACHED = ("accelerate=cache", "accelerate.interval=2", "prune=laptop", "prune.ratio=0.1", "prune.finetune.steps=4")


@pytest.mark.integration
def test_compress_fast_ensembles_combine_with_all_stages(tmp_path):
    run_pipeline(parse_config(compose([*TINY, "ensemble.solver=euler", f"folder={tmp_path}"])), Console(quiet=True))
    run = RunFolder(tmp_path)
    folders = {}
    for overrides in (DISTILLED, DRAFTED, CACHED, DENSE, DENSE_SID):
        config = compress_run(run, with_compression(run.load_config(), overrides), Console(quiet=True))
        folder = Path(describe_compression(run, config).splitlines()[0])
        folders[" ".join(overrides[:2])] = folder
        samples = EnsemblePipeline.from_pretrained(folder)(range(3), config.ensemble)
        assert samples.images.shape[0] == 3 and samples.latents.isfinite().all()
    points = {point.name: point for point in load_compression_points(run, build_graph(run.load_config()))}
    assert {"sid_2 + base_first + laptop + int8_dynamic", "truncate_anchors + int4_weight_only"} <= points.keys()
    assert points["sid_2 + base_first + laptop + int8_dynamic"].flops < 0.5 < points["cache_uniform"].flops < 1
    assert points["truncate_anchors + int4_weight_only"].flops == pytest.approx(0.5, abs=0.05)
    assert points["cache_uniform + laptop"].flops < points["cache_uniform"].flops
    with pytest.raises(ConfigError, match="few-step schedule of 2 steps"):
        prepare_sampling(run, tmp_path / "a.png", SamplingOptions(selection="sticky", steps=9, ensemble=folder))
    mixed = EnsemblePipeline.from_pretrained(folders["distill=sid distill.training.steps=4"]).ensemble.experts[0]
    assert mixed.few_step.times == (1.0, 0.5) and mixed.experts[0].few_step.is_distilled
    dense = EnsemblePipeline.from_pretrained(folders["distill=consistency distill.students=shared"]).ensemble
    assert list(dense.experts) == [0] and dense.router is None and not dense.missing
    assert points["consistency_2_shared"].bytes < 0.6
