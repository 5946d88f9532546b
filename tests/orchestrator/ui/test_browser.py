"""The page in a real browser: every view of four runs without violations of accessibility or of its own policy."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.run.lease import hold_lease
from orchestrator.run.run_folder import RunFolder
from tests.orchestrator.ui.run_folders import add_data, key_of, make_run, serve_images, serve_page
from tests.orchestrator.ui.test_watcher import HOLD

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
AXE = (Path(__file__).parent / "axe_core" / "axe.min.js").read_text(encoding="utf-8")
VIEWS = ("", "/stage/expert_1", "/partition", "/samples", "/samples/3", "/router", "/compression", "/reliability")

pytestmark = [pytest.mark.integration, pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as session:
        opened = session.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with everything, one that runs, one that failed, and one of 64 experts."""
    folder = tmp_path_factory.mktemp("browser")
    found = {name: make_run(folder / name) for name in ("whole", "running", "failed")}
    found["large"] = make_run(folder / "large", experts=64, rows=1000)
    for run in found.values():
        add_data(run)
    attempt = next(found["failed"].root.glob("work/router-*/attempt_1"))
    outcome = {"stage": "router", "attempt": 1, "state": "failed", "error": "ShardError: <b>truncated</b>"}
    (attempt / "outcome.json").write_text(json.dumps(outcome))
    with hold_lease(found["running"]):
        yield found


@pytest.fixture(scope="module")
def address(runs):
    with serve_page([run.root for run in runs.values()]) as served:
        yield served


def opened(browser, url, problems, **settings):
    """Open a page that reports script errors, failed requests, broken policies and other hosts in `problems`."""
    host = url.partition("/run/")[0].partition("/compare")[0]
    page = browser.new_context(**settings).new_page()
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(host) else problems.append(request.url))
    page.goto(url)
    return page


@pytest.mark.parametrize("name", ["whole", "running", "failed", "large"])
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_views_are_accessible_and_fit(browser, runs, address, name, scheme, width):
    problems, violations, wide = [], [], []
    settings = {"color_scheme": scheme, "viewport": {"width": width, "height": 800}}
    views = VIEWS if name == "whole" else ("", "/stage/expert_1", "/partition", "/reliability")
    paths = ["/", f"/compare?run={key_of(runs['whole'])}&run={key_of(runs['large'])}", "/nowhere"]
    for path in [f"/run/{key_of(runs[name])}{view}" for view in views] + (paths if name == "whole" else []):
        page = opened(browser, address + path, problems if path != "/nowhere" else [], bypass_csp=True, **settings)
        if path.endswith(key_of(runs[name])):
            page.wait_for_selector("#losses canvas")
        page.evaluate(AXE)
        violations += [
            (path, found["id"], found["nodes"][0]["html"]) for found in page.evaluate("axe.run()")["violations"]
        ]
        wide += [path] if page.evaluate("document.documentElement.scrollWidth") > width else []
        page.context.close()
    assert (violations, wide, problems) == ([], [], [])


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_playground_draws_what_the_form_says(browser, tmp_path, scheme, width):
    problems, settings = [], {"color_scheme": scheme, "viewport": {"width": width, "height": 800}}
    with serve_images(tmp_path) as service, serve_page([tmp_path], service=service) as address:
        page = opened(browser, address, problems, bypass_csp=False, **settings)
        page.click("text=Playground")
        page.fill("[name=prompt]", "a boot")
        page.fill("[name=n]", "2")
        page.fill("[name=seed]", "7")
        page.click("button:has-text('Draw')")
        page.wait_for_selector("#playground-state:has-text('2 images in')")
        captions = page.locator("#drawn .caption").all_text_contents()
        assert [caption.partition(" · ")[0] for caption in captions] == ["seed 7", "seed 8"]
        assert page.evaluate("document.querySelector('#drawn canvas').width") == 4
        page.fill("[name=steps]", "100000")
        page.click("button:has-text('Draw')")
        page.wait_for_selector("#playground-state:has-text('steps must be at most')")
        assert [problem for problem in problems if "400 (Bad Request)" not in problem] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page = opened(browser, f"{address}/playground", [], bypass_csp=True, **settings)
        page.evaluate(AXE)
        assert page.evaluate("axe.run()")["violations"] == []


def test_page_follows_a_run_to_the_death_of_its_controller(browser, tmp_path):
    run = make_run(tmp_path / "run", experts=2, rows=20)
    attempt = next(run.root.glob("work/router-*/attempt_1"))
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.root)], stdout=subprocess.PIPE, text=True)
    problems = []
    try:
        assert holder.stdout.readline() == "held\n"
        with serve_page([run.root]) as address:
            page = opened(browser, f"{address}/run/{key_of(run)}", problems)
            log = opened(browser, f"{address}/run/{key_of(run)}/stage/router", problems)
            for each in (page, log):
                each.wait_for_selector("#live.on")
            page.wait_for_selector("#losses canvas")
            with (attempt / "metrics.jsonl").open("a") as file:
                file.write('{"step": 12345, "loss": 0.54321}\n')
            page.click("summary:has-text('Last values')")
            page.wait_for_selector("#last-rows tr[data-name=router] >> text=0.54321")
            with (attempt / "log.txt").open("a") as file:
                file.write("one <b>more</b> line\n")
            log.wait_for_selector("#log >> text=one <b>more</b> line")
            page.wait_for_selector("text=Controlled by process")
            os.kill(holder.pid, 9)
            holder.wait()
            page.wait_for_selector(".banner.lost >> text=is gone")
            page.wait_for_selector("#losses canvas")
            assert problems == []
    finally:
        holder.kill()
        holder.wait()


def test_keyboard_opens_views_and_steps_through_the_map(browser, runs: dict[str, RunFolder], address):
    problems = []
    page = opened(browser, f"{address}/run/{key_of(runs['whole'])}", problems)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("2")
    page.wait_for_url("**/partition")
    page.wait_for_selector("#map-legend li")
    page.focus("#map")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#map-picture[alt='Training image 0 of cluster 0']")
    page.hover("#map")
    page.keyboard.press("0")
    page.wait_for_selector("h1:has-text('Runs')")
    boxes = page.query_selector_all("input[type=checkbox]")
    for box in boxes[:2]:
        box.check()
    page.click("text=Compare two runs")
    page.wait_for_selector("text=Settings that differ")
    assert problems == []
