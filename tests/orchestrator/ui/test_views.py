"""The views of data, samples, router, compression and reliability."""

import json
import re
import shutil

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from data_partition.shards.images import decode_image
from ddm_core.artifacts import publish, read_with_checksum, write_json, write_record
from ddm_core.files.checksums import checksum
from ensemble.config import TRAJECTORIES
from ensemble.evaluation.held_out_prompts import load_held_out_conditions
from orchestrator.pipeline.graph import build_graph
from orchestrator.reporting.pareto import CompressionPoint, pareto_front
from orchestrator.ui.facts.catalog import RunCatalog
from orchestrator.ui.facts.feature_map import project
from orchestrator.ui.facts.pictures import PictureCache
from orchestrator.ui.facts.samples import load_conditions
from orchestrator.ui.facts.scatter import draw_scatter
from orchestrator.ui.facts.trajectories import LEFT, RIGHT, STRIP, WIDTH, load_trajectories
from orchestrator.ui.server import create_app
from tests.orchestrator.ui.run_folders import add_data, key_of, make_run
from tests.orchestrator.ui.test_report import router_quality


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("views") / "run", seeds=range(100))
    add_data(folder)
    return folder


@pytest.fixture(scope="module")
def page(run):
    return TestClient(create_app(RunCatalog([run.root])), base_url=f"http://127.0.0.1/run/{key_of(run)}/")


@pytest.fixture(scope="module")
def stages(run):
    return {stage.name: stage for stage in build_graph(run.load_config())}


def test_partition_has_a_wall_for_every_cluster(page):
    text = page.get("partition").text
    pictures = re.findall(r"/cluster/(\d)/(\d+)\.png", text)
    assert [sum(cluster == str(k) for cluster, _ in pictures) for k in range(4)] == [24, 25, 26, 27]
    image = decode_image(page.get("cluster/3/26.png").content)
    assert image.shape == (16, 16, 1)
    assert page.get("cluster/3/27.png").status_code == 404 and page.get("cluster/9/0.png").status_code == 404


def test_map_places_each_image_and_finds_its_picture(page):
    found = page.get("map.json").json()
    x, cluster = np.array(found["x"]), np.array(found["cluster"])
    assert found["row"] == list(range(60)) and found["variance"] > 0.9
    assert min(found["x"]) == 0 and max(found["x"]) == 1
    assert np.ptp(x[cluster == 0]) < 0.2 and abs(x[cluster == 0].mean() - x[cluster == 1].mean()) > 0.8
    assert [int(decode_image(page.get(f"train/{row}.png").content)[0, 0, 0]) for row in (0, 39, 40, 59)] == [
        0,
        156,
        160,
        236,
    ]
    assert page.get("train/60.png").status_code == 404


def test_projection_equals_the_principal_components():
    random = np.random.default_rng(1)
    features = (random.normal(size=(200, 30)) * np.array([8.0, 4.0, *np.linspace(1.5, 0.1, 28)])).astype(np.float32)
    places, share = project(features)
    _, scales, axes = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    assert np.allclose(np.abs(places), np.abs((features - features.mean(axis=0)) @ axes[:2].T), atol=0.05)
    assert share == pytest.approx(float((scales[:2] ** 2).sum() / (scales**2).sum()), rel=1e-3)


def test_kept_pictures_stay_within_their_bytes(run, stages):
    cache = PictureCache(max_bytes=600)
    folder = run.artifact(stages["dataset"]) / "train"
    for row in range(60):
        cache.sample(folder, row)
    assert 0 < cache.kept_bytes <= 600


def test_large_pictures_are_scaled_down(tmp_path):
    folder = make_run(tmp_path / "run", experts=2, rows=5)
    add_data(folder, size=300)
    stage = next(stage for stage in build_graph(folder.load_config()) if stage.name == "dataset")
    assert decode_image(PictureCache().sample(folder.artifact(stage) / "train", 5)).shape == (192, 192, 3)


def test_conditions_are_those_that_the_score_used(run, stages):
    score = next(stage for stage in stages.values() if stage.kind == "score")
    found = list(load_conditions(run, list(stages.values()), score).values())[:9]
    pipeline = run.root / "pipeline"
    pipeline.mkdir()
    write_json(pipeline / "text_encoder.json", {"kind": "minilm", "length": 8})
    asked = load_held_out_conditions(run.artifact(stages["reference"]), 9, pipeline)
    shutil.rmtree(pipeline)
    names = ["Boot", "<Bag>"]
    assert found == [caption or names[label] for label, caption in zip(asked.class_ids, asked.captions, strict=True)]
    assert found[:4] == ["a boot", "<Bag>", "a bag", "Boot"]


def test_gallery_is_paged_searched_and_escaped(page):
    text = page.get("samples").text
    assert (
        text.count('loading="lazy"') == 96
        and text.count("/film/score_sticky/") == 9
        and "100 samples, page 1 of 2" in text
    )
    assert "<Bag>" not in text and "&lt;Bag&gt;" in text
    assert page.get("samples?page=2").text.count('loading="lazy"') == 4
    assert "25 samples match" in page.get("samples?q=A+BOOT").text
    assert page.get("samples?q=%22%3E%3Cscript%3E").text.count("<script>") == 0
    assert page.get("samples?score=../../etc").status_code == 200
    assert "sticky (default)" in page.get("samples/7").text and page.get("samples/100").status_code == 404


def test_trajectories_are_film_strips_with_their_experts(page, run, stages):
    text = page.get("samples/2").text
    strip = re.findall(r'src="(/run/[^"]+/film/score_sticky/2/(\d)\.png)".*?<span>([^<]*)</span></li>', text, re.DOTALL)
    assert [words for *_, words in strip] == ["t 1.00 · expert 2", "t 0.25 · expert 2", "image"]
    kept, image = (
        decode_image(page.get(f"{path}/2.png").content) for path in ("film/score_sticky/2", "sample/score_sticky")
    )
    assert (kept == image).all()
    assert "keeps the trajectories of seeds 0, 1, 2" in page.get("samples/7").text
    assert page.get("film/score_sticky/3/0.png").status_code == 404 == page.get("film/score_sticky/2/3.png").status_code
    score = next(stage for stage in stages.values() if stage.kind == "score")
    _, _, chart = load_trajectories(run, score).films("{}/{}".format)[1]
    areas = chart.layers
    assert [layer.expert for layer in areas] == [0, 1, 2, 3]
    np.testing.assert_allclose(np.sum([layer.probabilities for layer in areas], axis=0), 1, rtol=1e-6)
    assert sum(height * width for layer in areas for *_, width, height in layer.bars) == pytest.approx(
        STRIP * (WIDTH - LEFT - RIGHT)
    )


def test_router_shows_the_gates_of_the_picked_sample(page):
    text = page.get("router?score=score_sticky&seed=2").text
    assert re.findall(r'seed=(\d)" aria-current="true"', text) == ["2"] and "<polygon" in text and "a bag" in text


def test_score_of_an_older_version_says_how_to_get_trajectories(page, run, stages):
    score = next(stage for stage in stages.values() if stage.kind == "score")
    path = run.artifact(score) / TRAJECTORIES
    intact = path.read_bytes()
    try:
        path.write_bytes(intact[:100])
        assert f"{TRAJECTORIES} is damaged" in page.get("router").text
        path.unlink()
        for view in ("samples", "samples/2", "router"):
            assert f"ddm resume {run.root}" in page.get(view).text, view
        assert page.get("film/score_sticky/2/0.png").status_code == 404
    finally:
        path.write_bytes(intact)


def test_router_shows_its_charts_once_it_is_finished(tmp_path):
    folder = make_run(tmp_path / "run", experts=2, rows=5)
    add_data(folder)
    page = TestClient(create_app(RunCatalog([folder.root])), base_url=f"http://127.0.0.1/run/{key_of(folder)}/")
    assert "not finished yet" in page.get("router").text
    stage = next(stage for stage in build_graph(folder.load_config()) if stage.kind == "router")

    def fill(out):
        (out / "quality.json").write_text(json.dumps(router_quality()))
        return 0.0

    publish(folder.artifact(stage), fill, stage=stage.name, config=stage.config, inputs=stage.input_fingerprints)
    assert page.get("router").text.count("<svg") == 4


def test_reliability_names_attempts_and_goodput(page):
    text = page.get("reliability").text
    assert "Goodput" in text and "100.0 %" in text and "<svg" in text and "expert_0" in text


def test_compressions_are_dots_that_lead_to_their_samples(page, tmp_path):
    assert "No compressed ensemble is finished" in page.get("compression").text
    values = {"folder": tmp_path, "flops": 1.0, "memory": 1.0, "l2": 0.1, "cpu": None, "fd": 1.0}
    points = [
        CompressionPoint(name=name, bytes=size, kid=kid, **values)
        for name, size, kid in (("int8", 0.5, 1.1), ("int4", 0.25, 1.4), ("worse", 0.5, 2.0), ("unknown", 0.1, None))
    ]
    drawn = draw_scatter(points, pareto_front(points[:3]), {tmp_path: "score_int8"})
    int8, int4, worse, original = drawn.dots
    assert int4.x < int8.x < original.x and original.y > int8.y > int4.y > worse.y
    assert (int8.is_front, int4.is_front, worse.is_front) == (True, True, False) and int8.score == "score_int8"
    assert draw_scatter(points[3:], points[3:], {}) is None


def test_damaged_arrays_are_named(page, run, stages):
    score = next(stage for stage in stages.values() if stage.kind == "score")
    path = run.artifact(score) / "images.npy"
    intact = path.read_bytes()
    try:
        for content in (intact[:40], b"\x80\x04pickle", b""):
            path.write_bytes(content)
            answer = page.get("samples", headers={"Accept": "text/html"})
            assert answer.status_code == 500 and "images.npy is damaged" in answer.text, content
        Image.new("L", (4, 4)).save(path, "PNG")
        assert "is damaged" in page.get("sample/score_sticky/0.png").text
    finally:
        path.write_bytes(intact)


def test_record_of_another_form_is_named_and_hides_no_other_run(run, tmp_path):
    shutil.copytree(run.root, tmp_path / "copy")
    folder = type(run)(tmp_path / "copy")
    score = next(stage for stage in build_graph(folder.load_config()) if stage.kind == "score")
    manifest = folder.artifact(score) / "manifest.json"
    path = folder.artifact(score) / "scores.json"

    write_json(path, {"spaces": [1]})
    content = read_with_checksum(manifest)
    write_record(manifest, content | {"checksums": content["checksums"] | {"scores.json": checksum(path)}})
    page = TestClient(create_app(RunCatalog([folder.root, run.root])), base_url="http://127.0.0.1")
    text = page.get("/").text
    assert "unreadable" in text and "another form than this version writes" in text and text.count('name="run"') == 1
    assert page.get(f"/run/{key_of(folder)}").status_code == 500
