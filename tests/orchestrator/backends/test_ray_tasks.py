"""The embedded Ray cluster: loopback only, gone with the command, and honest about how an attempt ended."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.config.compute import ComputeConfig, ResourcesConfig
from orchestrator.controller import _backend, shield
from orchestrator.errors import ConfigError, OrchestratorError
from orchestrator.run.backend import Job
from orchestrator.run.run_folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def open_listeners() -> set[str]:
    """Listening TCP sockets of this machine that are reachable from others."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address = local.partition(":")[0]
            loopback = address.endswith("0100007F") or address == "00000000000000000000000001000000"
            if state == "0A" and not loopback:
                found.add(local)
    return found


def job(folder: Path, config: dict, attempt: int = 1, kind: str = "dataset") -> Job:
    (folder / f"attempt_{attempt}").mkdir(parents=True, exist_ok=True)
    return Job(
        stage="dataset",
        kind=kind,
        config=config,
        inputs={},
        input_fingerprints={},
        artifact=str(folder / "artifact"),
        scratch=str(folder / "state"),
        attempt=attempt,
        stop_files=(),
        resources=ResourcesConfig(cpus=1),
    )


def wait(backend) -> list:
    for _ in range(600):
        if ended := backend.poll(0.2):
            return ended
    raise AssertionError("nothing ended within two minutes")


@pytest.fixture(scope="module")
def listeners_before():
    return open_listeners()


@pytest.fixture(scope="module")
def backend(listeners_before):
    with _backend(ComputeConfig(cpus=1), RunFolder(Path())) as found:
        yield found


def test_it_listens_on_loopback_only(backend, listeners_before, tmp_path):
    backend.submit(job(tmp_path, {"source": "digits", "image_size": 8}))
    assert wait(backend)[0].state == "finished"
    assert open_listeners() - listeners_before == set()


def test_an_error_of_the_stage_is_not_a_lost_worker(backend, tmp_path):
    backend.submit(job(tmp_path, {"source": "digits", "image_size": 9}))
    outcome = wait(backend)[0]
    assert (outcome.state, outcome.transient) == ("failed", False)
    assert "MixedSizes" in outcome.error


def test_an_unknown_kind_is_an_error_with_its_name(backend, tmp_path):
    backend.submit(job(tmp_path, {}, kind="nonsense"))
    outcome = wait(backend)[0]
    assert outcome.state == "failed" and "nonsense" in outcome.error


def test_what_the_machine_does_not_have_is_refused(backend, tmp_path):
    greedy = replace(job(tmp_path, {}), resources=ResourcesConfig(gpus=3))
    with pytest.raises(ConfigError, match="asks for 3 GPU.*compute.gpus"):
        backend.submit(greedy)


def test_a_killed_worker_is_lost(backend, tmp_path):
    backend.submit(job(tmp_path, {"source": "fashion"}))
    while not (tmp_path / "attempt_1" / "worker.json").exists():
        assert not backend.poll(0.01)
    backend.kill("dataset")
    outcome = wait(backend)[0]
    assert (outcome.state, outcome.transient) == ("lost", True)


def test_it_is_gone_with_its_process():
    code = (
        "import os; from pathlib import Path; from orchestrator.config.compute import ComputeConfig\n"
        "from orchestrator.controller import _backend; from orchestrator.run.run_folder import RunFolder\n"
        "with _backend(ComputeConfig(cpus=1), RunFolder(Path())): print('up', flush=True); os.kill(os.getpid(), 9)"
    )
    mark = f"ddm-test-{os.getpid()}"
    environment = os.environ | {"DDM_MARK": mark}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert process.stdout == "up\n"
    deadline = time.monotonic() + 120  # Ray's agents look for their raylet from time to time, later on a busy machine
    while time.monotonic() < deadline:
        left = [entry for entry in Path("/proc").glob("[0-9]*") if mark.encode() in _environment(entry)]
        if not left:
            return
        time.sleep(0.2)
    raise AssertionError(f"still running two minutes later: {left}")


def _environment(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("backend", ["ray", "islands"])
def test_ray_is_shielded_before_anything_imports_it(backend, tmp_path):
    """Each backend in a process of its own that ends where Ray would be imported."""
    code = (
        "import os, sys; from pathlib import Path; from orchestrator.config.compute import *\n"
        "from orchestrator.controller import BACKENDS; from orchestrator.run.run_folder import RunFolder\n"
        "class Stop:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'ray':\n"
        "            print(*(os.environ.get(x) is not None for x in sys.argv[2:]), flush=True); os._exit(0)\n"
        "sys.meta_path.insert(0, Stop())\n"
        "BACKENDS[sys.argv[1]](ComputeConfig(), RunFolder(Path()))"
    )
    switches = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    ours = {name: value for name, value in os.environ.items() if name not in switches}
    command = [sys.executable, "-c", code, backend, *switches]
    said = subprocess.run(command, capture_output=True, text=True, env=ours, cwd=Path(__file__).parents[2])
    assert said.stdout == "True True True\n", said.stderr


def test_settings_that_come_too_late_are_refused(monkeypatch):
    import ray  # noqa: F401

    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    with pytest.raises(OrchestratorError, match="Ray was imported before"):
        shield(None)
