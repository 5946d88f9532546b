"""`ddm compress`: a smaller ensemble beside the whole one of a finished run, by the stages of the graph."""

from pathlib import Path

import pytest
from rich.console import Console

from ddm_core.artifacts import read_json
from ensemble.pipeline import DDMPipeline
from orchestrator.cli.compress import compress_run, describe_compression, with_compression
from orchestrator.cli.sample import sample_run
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import RunConfig, parse_config
from orchestrator.controller import run_pipeline
from orchestrator.errors import ConfigError
from orchestrator.pipeline.graph import build_graph
from orchestrator.reporting.page import write_report
from orchestrator.reporting.pareto import compression_points
from orchestrator.reporting.results import current_graph, score_rows
from orchestrator.run.run_folder import RunFolder

TINY = (
    "experiment=digits",
    "compute=inline",
    "data.limit=400",
    "expert.training.steps=40",
    "router.training.steps=40",
    "scores.num_samples=64",
    "ensemble.steps=4",
    "monolith=false",
)


def test_without_a_setting_there_is_no_stage_and_with_one_the_others_stay_as_they_are():
    whole, small = (
        {stage.name: stage.fingerprint for stage in build_graph(parse_config(compose(overrides)))}
        for overrides in (["experiment=digits"], ["experiment=digits", "quantize=int4_weight_only"])
    )
    assert small.keys() - whole.keys() == {"quantize", "score_int4_weight_only", "timing_int4_weight_only"}
    assert {name: small[name] for name in whole} == whole


def test_auto_is_chosen_once_and_scores_the_smaller_ensemble_too():
    config = parse_config(compose(["experiment=digits", "quantize=int8_weight_only", "ensemble=auto"]))
    stages = {stage.name: stage for stage in build_graph(config)}
    assert (
        stages["score_int8_weight_only"].inputs["selection_search"].stage
        is stages["score_auto"].inputs["selection_search"].stage
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantize=int3_weight_only"], "known: int4_dynamic, int4_weight_only"),
        (["quantize=null"], "known: int4_dynamic, int4_weight_only"),
        (["expert.noise_schedule=cosine"], "nothing else of a finished run changes"),
        (["quantize=int4_weight_only", "quantize.bits=7"], r"quantize\.weight_only\.bits"),
        (
            ["quantize=int4_weight_only", "quantize.bit=4"],
            r"quantize\.weight_only\.bit: unknown key; known here: bits, group_size",
        ),
        (["prune=laptop", "prune.finetune.step=4"], r"finetune\.step: unknown key; known here: .*steps"),
        (["quantize.bits=4"], "quantize: which method is meant"),
        (["distill=sid", "accelerate=cache"], "take one of the two"),
        (["accelerate=base_first"], "before their students; add distill"),
        (["accelerate=truncate", "accelerate.draft=student"], "what students draw; add distill"),
        (["distill=sid", "accelerate=truncate"], "students of distill would not be asked"),
        (["distill=sid", "stitch=small_late"], "leave stitch out"),
        (["accelerate=truncate", "stitch=small_late"], "leave stitch out"),
        (["distill=sid", "distill.students=shared", "accelerate=base_first"], "take distill.students=per_expert"),
        (["distill=sid", "distill.students=shared", "distill.shared_warmup_steps=3"], "set training.steps"),
        (["distill=mmd", "prune=ecodiff"], "take prune=laptop"),
        (["accelerate=truncate", "quantize=mixed_precision"], "take another after a draft"),
        (["accelerate=taylorseer", "prune=laptop"], "take accelerate=cache"),
        (["accelerate=taylorseer", "stitch=small_late"], "hooks want every step"),
        ([], "try quantize=int8_weight_only"),
    ],
)
def test_a_wrong_override_says_what_is_right(overrides, message):
    with pytest.raises(ConfigError, match=message):
        with_compression(RunConfig(), overrides)


def test_students_are_not_reflected():
    reflected = parse_config(compose(["experiment=digits", "+ensemble.reflection.steps=2"]))
    with pytest.raises(ValueError, match=r"leave ensemble\.reflection out"):
        with_compression(reflected, ["distill=sid"])


@pytest.mark.slow
def test_a_finished_run_is_compressed_scored_and_not_done_again(tmp_path):
    config = parse_config(compose([*TINY, f"folder={tmp_path}"]))
    first = run_pipeline(config, Console(quiet=True))
    run = RunFolder(Path(config.folder))
    smaller = with_compression(run.load_config(), ["quantize=int4_weight_only", "quantize.group_size=16"])
    result = run_pipeline(smaller, Console(quiet=True))
    assert (
        set(result.finished) - set(first.finished) == {"quantize", "score_int4_weight_only", "timing_int4_weight_only"}
        and result.submitted == 3
    )
    assert run_pipeline(smaller, Console(quiet=True)).submitted == 0

    rows = {row.name: row.scores for row in score_rows(run, current_graph(run, smaller))}
    said = describe_compression(run, smaller)
    folder = Path(said.splitlines()[0])
    found = read_json(folder / "compression.json")
    assert found["bytes_after"] < 0.5 * found["bytes_before"]
    assert rows["int4"]["spaces"].keys() == rows["sticky"]["spaces"].keys()
    assert DDMPipeline.from_pretrained(folder).ensemble.num_experts == smaller.partition.num_experts

    again = with_compression(run.load_config(), ["prune=ecodiff", "prune.mask_training.steps=4", "stitch=small_early"])
    assert compress_run(run, again, Console(quiet=True)).quantize is None
    points = {point.name: point for point in compression_points(run, build_graph(smaller))}
    assert points.keys() == {"int4", "ecodiff", "ecodiff + switch"}
    assert points["int4"].bytes == found["bytes_after"] / found["bytes_before"] and points["int4"].flops == 1
    assert points["ecodiff"].flops < points["ecodiff + switch"].flops < 1
    assert all(point.cpu and point.kid is not None and point.fd for point in points.values())
    page = write_report(run).read_text()
    assert "Compressed ensembles" in page and "ecodiff + switch" in page


DISTILLED = (
    "distill=sid",
    "distill.training.steps=4",
    "distill.shared_warmup_steps=3",
    "accelerate=base_first",
    "prune=laptop",
    "prune.ratio=0.2",
    "prune.finetune.steps=4",
    "quantize=int8_dynamic",
)
DRAFTED = (
    "accelerate=truncate",
    "accelerate.rows=32",
    "accelerate.start_time_grid=[0.2,0.5]",
    "quantize=int4_weight_only",
)
DENSE = ("distill=consistency", "distill.students=shared", "distill.teacher=true", "distill.training.steps=4")
DENSE_SID = ("distill=sid", "distill.students=shared", "distill.training.steps=3", "quantize=int8_weight_only")
CACHED = ("accelerate=cache", "accelerate.interval=2", "prune=laptop", "prune.ratio=0.2", "prune.finetune.steps=4")


@pytest.mark.slow
def test_what_is_faster_goes_through_the_other_stages_and_is_sampled_like_the_whole(tmp_path):
    run_pipeline(parse_config(compose([*TINY, "ensemble.solver=euler", f"folder={tmp_path}"])), Console(quiet=True))
    run = RunFolder(tmp_path)
    folders = {}
    for overrides in (DISTILLED, DRAFTED, CACHED, DENSE, DENSE_SID):
        config = compress_run(run, with_compression(run.load_config(), overrides), Console(quiet=True))
        folder = Path(describe_compression(run, config).splitlines()[0])
        folders[" ".join(overrides[:2])] = folder
        drawn = DDMPipeline.from_pretrained(folder)(range(3), config.ensemble)
        assert drawn.images.shape[0] == 3 and drawn.latents.isfinite().all()
    points = {point.name: point for point in compression_points(run, build_graph(run.load_config()))}
    assert {"sid_2 + base_first + laptop + int8_dynamic", "truncate_anchors + int4"} <= points.keys()
    assert points["sid_2 + base_first + laptop + int8_dynamic"].flops < 0.5 < points["cache_uniform"].flops < 1
    assert points["truncate_anchors + int4"].flops == pytest.approx(0.5, abs=0.05)
    assert points["cache_uniform + laptop"].flops < points["cache_uniform"].flops
    with pytest.raises(ConfigError, match="have their own 2"):
        sample_run(run, [0], "", "sticky", tmp_path / "a.png", 9, None, monolith=False, ensemble=folder)
    mixed = DDMPipeline.from_pretrained(folders["distill=sid distill.training.steps=4"]).ensemble.experts[0]
    assert mixed.course.times == (1.0, 0.5) and mixed.networks[0].course.is_distilled
    dense = DDMPipeline.from_pretrained(folders["distill=consistency distill.students=shared"]).ensemble
    assert list(dense.experts) == [0] and dense.router is None and not dense.missing
    assert points["consistency_2_dense"].bytes < 0.6
