"""Every page of synthetic runs: what it shows, what it escapes, and what it never serves."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from orchestrator.pipeline.graph import build_graph
from orchestrator.run.lease import hold_lease
from orchestrator.ui.facts.catalog import RunCatalog
from orchestrator.ui.facts.overview import OverviewCache
from orchestrator.ui.server import create_app
from tests.orchestrator.ui.run_folders import key_of, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("page") / "few")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("page") / "more", experts=12, rows=1000, seeds=range(8, 16))


@pytest.fixture(scope="module")
def page(run, other):
    return TestClient(create_app(RunCatalog([run.root, other.root])), base_url="http://127.0.0.1")


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run that a test may change, and its page."""
    shutil.copytree(run.root, tmp_path / "copy")
    folder = type(run)(tmp_path / "copy")
    return folder, TestClient(create_app(RunCatalog([folder.root])), base_url="http://127.0.0.1"), key_of(folder)


def files_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_pages_write_nothing_into_the_run_folder(page, run):
    before, key = files_of(run.root), key_of(run)
    for path in ("", "/status", "/stage/expert_1", "/curves.json", "/log", "/log?stage=expert_1"):
        assert page.get(f"/run/{key}{path}").status_code == 200, path
    assert files_of(run.root) == before


def test_list_of_runs_names_state_score_and_samples(page, run):
    text = page.get("/").text
    assert text.count('name="run"') == 2 and "stopped" in text and "FD in efficientnet_lite0" in text
    (picture,) = re.findall(rf"/run/{key_of(run)}/grid/\w+\.png", text)
    assert page.get(picture).content.startswith(b"\x89PNG")


def test_run_shows_every_stage_in_graph_and_table(page, run):
    text = page.get(f"/run/{key_of(run)}").text
    for stage in build_graph(run.load_config()):
        assert text.count(f'/stage/{stage.name}"') == 2, stage.name
    assert "no work done twice" in text


def test_many_experts_share_one_box(page, other):
    text = page.get(f"/run/{key_of(other)}/status").text
    assert "12 experts</text>" in text and len(re.findall(r'class="cell (?:finished|running|lost)"', text)) == 12


def test_curves_are_short_however_long_the_files_are(page, run, other):
    short, long = (page.get(f"/run/{key_of(each)}/curves.json").json() for each in (run, other))
    assert short["steps"] == list(range(10, 601, 10)) and None not in short["series"][0]["losses"]
    assert len(long["steps"]) <= 512 and long["steps"][-1] == 10_000
    assert {series["kind"] for series in long["series"]} >= {"expert", "router"}
    assert all(len(series["losses"]) == len(long["steps"]) for series in long["series"])


def test_rare_held_out_losses_are_all_found(copy):
    folder, page, key = copy
    path = next(folder.root.glob("work/router-*/attempt_1")) / "metrics.jsonl"
    rows = [{"step": step, "loss": 1.0} | ({"held_out": step} if step % 500 == 0 else {}) for step in range(1, 5001)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = page.get(f"/run/{key}/curves.json").json()
    router = next(series for series in curves["series"] if series["name"] == "router")
    assert [value for value in router["held_out"] if value is not None] == list(range(500, 5001, 500))
    assert all(series["held_out"] is None for series in curves["series"] if series is not router)


def test_comparison_pairs_the_same_seeds_and_lists_differences(page, run, other):
    text = page.get("/compare", params={"run": [key_of(run), key_of(other)]}).text
    assert re.findall(r'title="seed (\d+)"', text) == ["8", "9", "10", "11"] * 2
    pictures = re.findall(r"/run/[\w-]+/sample/\w+/(\d+)\.png", text)
    assert pictures == ["8", "9", "10", "11", "0", "1", "2", "3"]
    assert re.search(r"partition\.num_experts</code></th><td[^>]*>4</td><td[^>]*>12<", text)
    assert page.get("/compare", params={"run": key_of(run)}).status_code == 404


def test_values_are_escaped(copy):
    folder, page, key = copy
    attempt = next(folder.root.glob("work/expert_1-*/attempt_1"))
    (attempt / "outcome.json").write_text(
        '{"stage": "expert_1", "attempt": 1, "state": "failed", "error": "<script>alert(1)</script>"}'
    )
    shutil.rmtree(next(folder.root.glob("artifacts/expert_1-*")))
    for path in ("", "/stage/expert_1"):
        text = page.get(f"/run/{key}{path}").text
        assert "<script>alert" not in text and "&lt;script&gt;alert" in text


def test_runs_are_read_again_only_if_their_files_have_changed(copy):
    folder, _, _ = copy
    cache, entries = OverviewCache(), RunCatalog([folder.root]).entries()
    (first,), (second,) = cache.load(entries), cache.load(entries)
    assert first is second
    attempt = next(folder.root.glob("work/router-*/attempt_1"))
    (attempt / "outcome.json").write_text('{"stage": "router", "attempt": 1, "state": "failed", "error": "x"}')
    (third,) = cache.load(entries)
    assert third is not second and (first.state, third.state) == ("stopped", "failed")


def test_log_is_served_in_parts_without_control_characters(copy):
    folder, page, key = copy
    log = next(folder.root.glob("work/expert_1-*/attempt_1")) / "log.txt"
    log.write_text("".join(f"line {number}\n" for number in range(20_000)) + "\x1b[2Jé")
    first = page.get(f"/run/{key}/log?stage=expert_1")
    assert (
        first.headers["content-type"].startswith("text/plain") and int(first.headers["x-log-end"]) == log.stat().st_size
    )
    assert first.text.startswith("line ") and first.text.endswith("line 19999\n\N{REPLACEMENT CHARACTER}[2Jé")
    text, start = "", 0
    while start < log.stat().st_size:
        part = page.get(f"/run/{key}/log?stage=expert_1&start={start}")
        text, start = text + part.text, int(part.headers["x-log-end"])
    assert text == log.read_text().replace("\x1b", "\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py",
        "/static/%2e%2e/server.py",
        "/static/..%2f..%2fcontroller.py",
        "/run/{key}/../../etc/passwd",
        "/run/..%2f..%2fetc/curves.json",
        "/run/{key}/stage/..%2f..%2f..%2fetc%2fpasswd",
        "/run/{key}/log?stage=../../../../etc/passwd",
        "/run/{key}/grid/..%2f..%2fconfig.yaml.png",
        "/run/{key}/grid/dataset.png",
        "/run/{key}/sample/score_sticky/999.png",
        "/run/{key}/sample/score_sticky/-1.png",
        "/run/{key}/config.yaml",
    ],
)
def test_nothing_but_the_pictures_and_logs_is_served(page, run, path):
    answer = page.get(path.format(key=key_of(run)))
    assert answer.status_code in (404, 422) and "root:" not in answer.text and "import" not in answer.text


def test_link_out_of_the_run_folder_is_not_followed(copy, tmp_path):
    folder, page, key = copy
    secret = tmp_path / "secret"
    secret.write_text('{"step": 1, "loss": 7.25}\n')
    attempt = next(folder.root.glob("work/router-*/attempt_1"))
    for name in ("log.txt", "metrics.jsonl", "samples-00000100.png"):
        (attempt / name).unlink(missing_ok=True)
        (attempt / name).symlink_to(secret)
    for path in ("log?stage=router", "curves.json", "steps/router/100.png"):
        answer = page.get(f"/run/{key}/{path}")
        assert answer.status_code == 404 and "leads out of the run folder" in answer.text and "7.25" not in answer.text


def test_damaged_run_is_listed_with_its_error(copy):
    folder, page, key = copy
    folder.config_file.write_text(folder.config_file.read_text() + "\nseed: 7\n")
    assert "does not match its checksum" in page.get("/").text
    answer = page.get(f"/run/{key}", headers={"Accept": "text/html"})
    assert answer.status_code == 404 and "does not match its checksum" in answer.text and "<h1>" in answer.text


def test_living_and_dead_controllers_are_named(copy):
    folder, page, key = copy
    with hold_lease(folder):
        assert "Controlled by process" in page.get(f"/run/{key}").text
        assert "running</span>" in page.get("/").text
    code = "import sys; from pathlib import Path; from orchestrator.run.lease import hold_lease\n"
    code += "from orchestrator.run.run_folder import RunFolder; import os\n"
    code += "with hold_lease(RunFolder(Path(sys.argv[1]))): os._exit(1)"
    subprocess.run([sys.executable, "-c", code, str(folder.root)], check=False)
    text = page.get(f"/run/{key}").text
    assert "is gone. Nothing is lost" in text and "ddm resume" in text


def test_page_imports_neither_torch_nor_ray():
    code = (
        "import sys, orchestrator.ui.command, orchestrator.ui.server\n"
        "print([name for name in ('torch', 'ray', 'wandb', 'diffusers') if name in sys.modules])"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "[]\n"
