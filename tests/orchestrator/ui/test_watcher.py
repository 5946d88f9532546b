"""The stream of changes over a real connection: rows, logs, status, and a controller that dies."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import requests

from orchestrator.run.run_folder import RunFolder
from tests.orchestrator.ui.run_folders import key_of, make_run, serve_page

HOLD = """
import sys, time
from pathlib import Path
from orchestrator.run.lease import hold_lease
from orchestrator.run.run_folder import RunFolder
with hold_lease(RunFolder(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", experts=2, rows=20)


def events(answer: requests.Response) -> Iterator[tuple[str, object]]:
    kind = ""
    for line in answer.iter_lines(chunk_size=1, decode_unicode=True):
        if line.startswith("event:"):
            kind = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            yield kind, json.loads(line.removeprefix("data:"))


def stream(address: str, run: RunFolder) -> Iterator[tuple[str, object]]:
    answer = requests.get(f"{address}/run/{key_of(run)}/events", stream=True, timeout=60)
    found = events(answer)
    assert next(found) == ("open", True)
    return found


def wait_for(found: Iterator[tuple[str, object]], kind: str) -> object:
    return next(data for name, data in found if name == kind)


def test_new_row_log_line_and_status_arrive(run):
    attempt = next(run.root.glob("work/router-*/attempt_1"))
    with serve_page([run.root]) as address:
        first, second = stream(address, run), stream(address, run)
        with (attempt / "metrics.jsonl").open("a") as file:
            file.write('{"step": 210, "loss": 0.5, "held_out": 0.25}\n')
        for found in (first, second):
            assert wait_for(found, "rows") == {"router": [210, 0.5, 0.25]}
        with (attempt / "log.txt").open("a") as file:
            file.write("more\n")
        assert wait_for(first, "logs") == ["router"]
        (attempt / "outcome.json").write_text('{"stage": "router", "attempt": 1, "state": "failed", "error": "x"}')
        assert wait_for(first, "status") is True
        shutil.rmtree(run.root)
        assert requests.get(f"{address}/", timeout=20).status_code == 200


def test_death_of_the_controller_arrives(run):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.root)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with serve_page([run.root]) as address:
            found = stream(address, run)
            status = f"{address}/run/{key_of(run)}/status"
            assert "Controlled by" in requests.get(status, timeout=20).text
            holder.kill()
            holder.wait()
            assert wait_for(found, "status") is True
            assert "is gone" in requests.get(status, timeout=20).text
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.integration
def test_interrupt_ends_the_server_and_its_open_pages(run):
    command = [sys.executable, "-m", "orchestrator", "ui", str(run.root), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        address = server.stdout.readline().split()[0]
        found = stream(address, run)
        server.send_signal(signal.SIGINT)
        assert list(found) == []
        output, errors = server.communicate(timeout=60)
        assert (server.returncode, output, errors) == (130, "", "")
    finally:
        server.kill()
