"""The HTML report: its contents from invented facts, and from a run folder in which nothing is finished."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from orchestrator.config.schema import RunConfig
from orchestrator.reporting import charts
from orchestrator.reporting.costs import CostRow
from orchestrator.reporting.facts import AuditFacts, ClusterFacts
from orchestrator.reporting.pareto import MAX_KID_RATIO, CompressionPoint, select_good
from orchestrator.reporting.summary import summary_tiles
from orchestrator.reporting.tables.ranking import ScoreRow, rank_rows
from orchestrator.run.run_folder import RunFolder
from orchestrator.ui.facts.drawings import router_charts
from orchestrator.ui.facts.pipeline_graph import BOX_WIDTH, draw_graph
from orchestrator.ui.facts.scatter import draw_scatter
from orchestrator.ui.facts.sections import list_flops, merge_costs
from orchestrator.ui.facts.trajectories import Trajectories
from orchestrator.ui.report import name_some, render_report, write_report
from tests.orchestrator.ui.run_folders import add_data, make_run, trajectories

DISTANCES = {"fd": 1.0, "fd_std": 0.1, "kid": 0.01, "kid_std": 0.002, "precision": 0.5, "recall": 0.6}
PIXELS = DISTANCES | dict.fromkeys(("fd_std", "kid", "kid_std", "precision", "recall"))
COPIES = {"share": 0.02, "expected": 0.01, "p_value": 0.2}
ROUTER_BIN_NAMES = ("cross_entropy", "accuracy", "calibration_error", "calibration_error_floor")


def score_row(name, fd=2.0, *, is_default=False) -> ScoreRow:
    scores = {
        "num_samples": 256,
        "held_out": 600,
        "selection": name,
        "spaces": {
            name: base | {"fd": fd, "floor": base, "codec": base}
            for name, base in (("efficientnet_lite0", DISTANCES), ("pixels", PIXELS))
        },
        "class_coverage": None,
        "class_tv": None,
        "class_tv_floor": None,
        "cluster_share_tv": 0.1,
        "cluster_share_tv_floor": 0.05,
        "copies": COPIES,
        "calls_per_step": 1.0,
        "flops_per_image": 1.5e9,
        "text": {
            "captions": 80,
            "recall": 0.7,
            "recall_real": 0.9,
            "recall_chance": 0.25,
            "class_accuracy": None,
            "class_accuracy_real": None,
        },
    }
    return ScoreRow(name=name, scores=scores, is_default=is_default)


def selection_search() -> dict:
    space_values = {"efficientnet_lite0": 1.0, "pixels": 2.0}
    candidate = {
        "fd": space_values,
        "kid": {"efficientnet_lite0": 2.0},
        "relative": space_values,
        "mean": 1.4,
        "calls": 1.0,
    }
    candidates = [
        candidate | {"name": "top_1", "is_affordable": True},
        candidate | {"name": "full", "is_affordable": False},
    ]
    return {"name": "top_1", "why": "top_1 is <best>", "candidates": candidates}


def audit() -> AuditFacts:
    share = {"quantile": 0.01, "share": 0.2, "low": 0.1, "high": 0.3, "expected": 0.01, "p_value": 1e-6}
    row = {"samples": 100, "held_out": 50, "ratio": 1.0, "shares": [share]}
    without_samples = {"samples": 0, "held_out": 50, "ratio": None, "shares": []}
    spaces = {"pixels": {"overall": row, "clusters": [row, without_samples]}}
    return AuditFacts(name="sticky", result={"spaces": spaces, "training": 400, "made_by": "draw"}, picture=b"png")


def router_quality() -> dict:
    names = [f"{name}{suffix}" for name in ROUTER_BIN_NAMES for suffix in ("", "_null")]
    values = dict.fromkeys([*names, "calibration_error_before_null"], 0.3)
    floors = dict.fromkeys(
        ("prior_entropy", "prior_entropy_null", "largest_share", "largest_share_null"),
        0.5,
    )
    return floors | {"bins": [values | {"t_low": 0.0, "t_high": 0.5}, values | {"t_low": 0.5, "t_high": 1.0}]}


def page_facts(folder: Path, *, with_monolith: bool) -> dict:
    """Return the facts of a run of which every section is shown."""
    config = RunConfig(name="digits", folder=str(folder), monolith=with_monolith)
    rows = [score_row("monolith", 2.5)] if with_monolith else []
    rows += [score_row("sticky", is_default=True), score_row("full")]
    cost = CostRow(
        stage="expert_0", attempts=2, seconds=90.0, cpu_seconds=180.0, used_cpu_s=120.0, lost_s=5.0, lost_steps=10
    )
    costs = [replace(cost, price=1.5, unpriced_s=10.0, bytes_out=1000, gpu_seconds=60.0)]
    point = CompressionPoint(
        name="int8",
        folder=folder,
        bytes=0.3,
        flops=1.0,
        memory=1.0,
        l2=0.1,
        cpu=None if with_monolith else 0.5,
        kid=1.1,
        fd=1.0,
    )
    curves = {name: [(10.0, 2.0), (20.0, 1.0)] for name in ["expert_0", "expert_1"]}
    bars = [("expert_0 #1", "expert_0", 0.0, 5.0, "lost"), ("expert_0 #2", "expert_0", 6.0, 9.0, "finished")]
    flops = {"expert_0": 1e12, "expert_1": 1e12} | ({"monolith": 2e12} if with_monolith else {})
    overview = SimpleNamespace(
        config=config,
        tiles=summary_tiles(rows, costs[0], []),
        entry=SimpleNamespace(name="digits", run=SimpleNamespace(root="<digits>")),
    )
    kept = Trajectories(**trajectories(np.zeros((3, 8, 8, 1), np.uint8), 4, range(3)))
    return {
        "overview": overview,
        "drawing": draw_graph([], []),
        "box_width": BOX_WIDTH,
        "films": kept.films("{}/{}".format, 1),
        "conditions": {0: "<boot>"},
        "walls": {},
        "classes": {},
        "config": config,
        "yaml": "name: <digits>",
        "unfinished": "score_full",
        "missing": "expert_3",
        "missing_count": 1,
        "missing_share": 0.25,
        "rows": rows,
        "why": "because",
        "ranking": rank_rows(rows),
        "selection_search": selection_search(),
        "points": [point],
        "good": select_good([point]),
        "scatters": [chart for cost in ("bytes", "cpu") if (chart := draw_scatter([point], [point], {}, cost))],
        "grids": [(row.label, b"png") for row in rows[:2]],
        "audits": [audit()],
        "attempts": [{"stage": "expert_0", "attempt": 1, "state": "lost", "error": "<killed>"}],
        "timeline": charts.themed(charts.timeline(bars), "timeline"),
        "costs": costs,
        "total": costs[0],
        "clusters": [ClusterFacts(cluster_id=0, count=10, share=1.0, epochs=None, picture=b"png")],
        "loss_chart": charts.themed(charts.line_chart(curves, "step", "loss"), "loss"),
        "loss_note": "",
        "damaged": "expert_1",
        "held_out_chart": None,
        "router_loss_chart": None,
        "router_charts": router_charts(router_quality()),
        "flops": list_flops(flops),
        "step_samples": [("expert_0, step 500, KID 0.100 ± 0.010", b"png")],
    }


@pytest.fixture(scope="module", params=[True, False], ids=["monolith", "no monolith"])
def page(request, tmp_path_factory):
    return render_report(page_facts(tmp_path_factory.mktemp("run"), with_monolith=request.param)), request.param


def test_page_is_one_file_without_scripts(page):
    text, _ = page
    assert text.lstrip().startswith("<!doctype html>") and "<script" not in text
    assert 'src="http' not in text and 'href="http' not in text and "url(http" not in text


def test_samples_of_experts_alone_are_labelled(page):
    text, _ = page
    assert 'alt="Samples of expert_0, step 500, KID 0.100 ± 0.010"' in text


def test_scores_of_text_stand_beside_real_images_and_chance(page):
    text, _ = page
    found = re.findall(r">(sticky|real images|chance)[^<]*</th><td>([\d.]+ %)</td>", text)
    assert found == [("sticky", "70.0 %"), ("real images", "90.0 %"), ("chance", "25.0 %")]


def test_page_escapes_every_value(page):
    text, _ = page
    assert "<boot>" not in text and "<digits>" not in text and "<best>" not in text and "<killed>" not in text
    assert "&lt;digits&gt;" in text and "&lt;best&gt;" in text and "&lt;killed&gt;" in text


def test_every_section_is_in_the_contents(page):
    text, _ = page
    sections = re.findall(r'<h2 id="([^"]+)"', text)
    contents = re.findall(r'<li><a href="#([^"]+)"', text)
    assert sections == contents and len(sections) == 13
    targets = set(re.findall(r' id="([^"]+)"', text))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= targets


def test_every_section_has_a_sentence_on_how_to_read_it(page):
    text, _ = page
    *sections, configuration = text.split("<h2 ")[1:]
    for section in sections:
        shown = len(re.findall(r"<table|<div class=\"wide\"", section))
        sentences = re.findall(r'class="read">(.+?)</', section)
        assert len(sentences) >= max(1, shown), section[:60]
        assert all(sentence.endswith(".") for sentence in sentences)
    assert "<pre>" in configuration


def test_ids_are_unique_although_charts_share_a_page(page):
    text, with_monolith = page
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert text.count("<svg") == (8 if with_monolith else 9)


def test_charts_take_their_neutral_colors_from_the_theme(page):
    text, _ = page
    drawings = [drawing for drawing in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL) if "xmlns:xlink" in drawing]
    assert len(drawings) == 5
    for drawing in drawings:
        assert 'role="img" aria-label="' in drawing and "#ffffff" not in drawing and "#000000" not in drawing
        assert f"var(--chart-ink, {charts.INK})" in drawing
        assert set(re.findall(re.escape(charts.INK), re.sub(r"var\([^)]*\)", "", drawing))) == set()


def test_monolith_is_named_only_if_the_run_has_one(page):
    text, with_monolith = page
    assert ("monolith" in text.lower()) == with_monolith


def test_cpu_time_is_reserved_or_measured(page):
    text, _ = page
    for words in re.findall(r"[\w ]{20}CPU time[\w ]{0,10}", re.sub(r"<[^>]+>", " ", text)):
        assert (
            "eserved CPU time" in words
            or "sed CPU time" in words
            or "CPU time per image" in words
            or "in bytes" in words
        ), words


def test_page_names_missing_experts_and_unfinished_stages(page):
    text, _ = page
    assert "The ensemble runs without expert_3" in text and "25.0 % of the training images" in text
    assert "Not finished: score_full" in text


def test_sentences_are_separated_by_spaces(page):
    text, _ = page
    for paragraph in re.findall(r"<p [^>]*>(.*?)</p>", text, flags=re.DOTALL):
        assert not re.search(r"[a-z]\.[A-Z]", re.sub(r"<[^>]+>", "", paragraph)), paragraph


@pytest.mark.parametrize(("kid", "is_good"), [(0.9, True), (MAX_KID_RATIO, True), (1.6, False), (None, False)])
def test_compression_is_highlighted_if_its_kid_is_low(tmp_path, kid, is_good):
    point = CompressionPoint(
        name="int8", folder=tmp_path, bytes=0.3, flops=1.0, memory=1.0, l2=0.1, cpu=1.0, kid=kid, fd=1.0
    )
    assert select_good([point]) == ([point] if is_good else [])


def test_many_experts_share_a_row_of_costs():
    rows = [CostRow(stage=f"expert_{k}", attempts=1, seconds=float(k)) for k in range(300)]
    dataset = CostRow(stage="dataset", attempts=1, seconds=5.0)
    assert merge_costs([dataset, *rows[:8]]) == [dataset, *rows[:8]]
    first, merged = merge_costs([dataset, *rows])
    assert first == dataset and (merged.stage, merged.attempts, merged.seconds) == ("300 experts", 300, 44850.0)


def test_long_lists_of_names_are_counted():
    names = [f"expert_{k}" for k in range(300)]
    assert name_some(names[:9]) == ", ".join(names[:9])
    assert name_some(names) == f"{', '.join(names[:8])} and 292 more"


def test_report_of_a_run_has_its_trajectories_in_one_file(tmp_path):
    run = make_run(tmp_path / "run", experts=2, rows=5)
    add_data(run)
    text = write_report(run).read_text()
    assert text.count('alt="Clean prediction at t = 1.00" width') == 2 and "a boot" in text
    assert set(re.findall(r'(?:src|href)="([^"#]{1,5})', text)) == {"data:"}


def test_report_of_an_unstarted_run_lists_all_stages(tmp_path):
    run = RunFolder(tmp_path)
    run.save_config(RunConfig(name="empty", folder=str(tmp_path)))
    text = write_report(run).read_text()
    assert "Not finished: dataset" in text and re.findall(r'<h2 id="([^"]+)"', text) == ["configuration"]
