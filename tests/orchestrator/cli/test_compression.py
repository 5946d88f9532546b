"""`ddm compress`: a smaller ensemble beside the whole one of a finished run, by the stages of the graph."""

from pathlib import Path

import pytest
from rich.console import Console

from ddm_core.artifacts import read_json
from ensemble.pipeline import DDMPipeline
from orchestrator.cli.compress import compress_run, describe_compression, with_compression
from orchestrator.cli.sample import draw
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import RunConfig, parse_config
from orchestrator.controller import run_pipeline
from orchestrator.errors import ConfigError
from orchestrator.pipeline.graph import build_graph
from orchestrator.reporting.page import write_report
from orchestrator.reporting.pareto import points_of
from orchestrator.reporting.results import score_rows, standing_graph
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
        for overrides in (["experiment=digits"], ["experiment=digits", "quantize=int4"])
    )
    assert small.keys() - whole.keys() == {"quantize", "score_int4", "timing_int4"}
    assert {name: small[name] for name in whole} == whole


def test_auto_is_chosen_once_and_scores_the_smaller_ensemble_too():
    config = parse_config(compose(["experiment=digits", "quantize=int8", "ensemble=auto"]))
    stages = {stage.name: stage for stage in build_graph(config)}
    assert stages["score_int8"].inputs["choice"].stage is stages["score_auto"].inputs["choice"].stage


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantize=int3"], "known: budget, int4, int4_compute, int8"),
        (["quantize=null"], "known: budget, int4, int4_compute, int8"),
        (["expert.path=cosine"], "nothing else of a finished run changes"),
        (["quantize=int4", "quantize.bits=7"], r"quantize\.weights\.bits"),
        (["quantize=int4", "quantize.bit=4"], r"quantize\.weights\.bit: unknown key; known here: bits, group"),
        (["prune=laptop", "prune.retraining.step=4"], r"retraining\.step: unknown key; known here: .*steps"),
        (["quantize.bits=4"], "quantize: which method is meant"),
        (["distill=sid", "accelerate=cache"], "take one of the two"),
        (["accelerate=base_first"], "before their students; add distill"),
        (["accelerate=truncate", "accelerate.draft=student"], "what students draw; add distill"),
        (["distill=sid", "accelerate=truncate"], "students of distill would not be asked"),
        (["distill=sid", "switch=clean"], "leave switch out"),
        (["accelerate=truncate", "switch=clean"], "leave switch out"),
        (["distill=sid", "distill.students=one", "accelerate=base_first"], "take distill.students=each"),
        (["distill=sid", "distill.students=one", "distill.common_steps=3"], "set training.steps"),
        (["distill=mmd", "prune=ecodiff"], "take prune=laptop"),
        (["accelerate=truncate", "quantize=budget"], "take another after a draft"),
        (["accelerate=taylorseer", "prune=laptop"], "take accelerate=cache"),
        (["accelerate=taylorseer", "switch=clean"], "hooks want every step"),
        ([], "try quantize=int8"),
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
    smaller = with_compression(run.load_config(), ["quantize=int4", "quantize.group=16"])
    result = run_pipeline(smaller, Console(quiet=True))
    assert (
        set(result.finished) - set(first.finished) == {"quantize", "score_int4", "timing_int4"}
        and result.submitted == 3
    )
    assert run_pipeline(smaller, Console(quiet=True)).submitted == 0

    rows = {row.name: row.scores for row in score_rows(run, standing_graph(run, smaller))}
    said = describe_compression(run, smaller)
    folder = Path(said.splitlines()[0])
    found = read_json(folder / "compression.json")
    assert found["bytes_after"] < 0.5 * found["bytes_before"]
    assert rows["int4"]["spaces"].keys() == rows["sticky"]["spaces"].keys()
    assert DDMPipeline.from_pretrained(folder).ensemble.num_experts == smaller.partition.num_experts

    again = with_compression(run.load_config(), ["prune=ecodiff", "prune.learning.steps=4", "switch=noisy"])
    assert compress_run(run, again, Console(quiet=True)).quantize is None
    points = {point.name: point for point in points_of(run, build_graph(smaller))}
    assert points.keys() == {"int4", "ecodiff", "ecodiff + switch"}
    assert points["int4"].bytes == found["bytes_after"] / found["bytes_before"] and points["int4"].flops == 1
    assert points["ecodiff"].flops < points["ecodiff + switch"].flops < 1
    assert all(point.cpu and point.kid is not None and point.fd for point in points.values())
    page = write_report(run).read_text()
    assert "Compressed ensembles" in page and "ecodiff + switch" in page


DISTILLED = (
    "distill=sid",
    "distill.training.steps=4",
    "distill.common_steps=3",
    "accelerate=base_first",
    "prune=laptop",
    "prune.share=0.2",
    "prune.retraining.steps=4",
    "quantize=int8_compute",
)
DRAFTED = ("accelerate=truncate", "accelerate.rows=32", "accelerate.tried=[0.2,0.5]", "quantize=int4")
DENSE = ("distill=consistency", "distill.students=one", "distill.teacher=true", "distill.training.steps=4")
DENSE_SID = ("distill=sid", "distill.students=one", "distill.training.steps=3", "quantize=int8")
CACHED = ("accelerate=cache", "accelerate.interval=2", "prune=laptop", "prune.share=0.2", "prune.retraining.steps=4")


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
    points = {point.name: point for point in points_of(run, build_graph(run.load_config()))}
    assert {"sid_2 + base_first + laptop + int8_compute", "truncate_anchors + int4"} <= points.keys()
    assert points["sid_2 + base_first + laptop + int8_compute"].flops < 0.5 < points["cache_uniform"].flops < 1
    assert points["truncate_anchors + int4"].flops == pytest.approx(0.5, abs=0.05)
    assert points["cache_uniform + laptop"].flops < points["cache_uniform"].flops
    with pytest.raises(ConfigError, match="have their own 2"):
        draw(run, [0], "", "sticky", tmp_path / "a.png", 9, None, monolith=False, ensemble=folder)
    mixed = DDMPipeline.from_pretrained(folders["distill=sid distill.training.steps=4"]).ensemble.experts[0]
    assert mixed.course.times == (1.0, 0.5) and mixed.networks[0].course.is_distilled
    dense = DDMPipeline.from_pretrained(folders["distill=consistency distill.students=one"]).ensemble
    assert list(dense.experts) == [0] and dense.router is None and not dense.missing
    assert points["consistency_2_dense"].bytes < 0.6
