"""The embedded Ray cluster: loopback only, ended with the command, and correct outcomes of attempts."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.config.compute import ComputeConfig, ResourcesConfig
from orchestrator.controller import configure_ray_security, open_backend
from orchestrator.errors import ConfigError, OrchestratorError
from orchestrator.run.backend import Job
from orchestrator.run.run_folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def open_listeners() -> set[str]:
    """Return the listening TCP sockets of this machine that are reachable from others."""
    listeners = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address = local.partition(":")[0]
            loopback = address.endswith("0100007F") or address == "00000000000000000000000001000000"
            if state == "0A" and not loopback:
                listeners.add(local)
    return listeners


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


@pytest.mark.integration
def test_labels_wait_for_a_node_that_has_them(tmp_path):
    code = (
        "import sys, json; from dataclasses import replace; from pathlib import Path\n"
        "from ray.cluster_utils import Cluster; from orchestrator.config.compute import *\n"
        "from orchestrator.backends.ray_tasks import RayBackend\n"
        "from tests.orchestrator.backends.test_ray_tasks import job\n"
        "cluster = Cluster(initialize_head=True, head_node_args={'num_cpus': 1, 'include_dashboard': False})\n"
        "backend = RayBackend(ComputeConfig(address=cluster.address))\n"
        "west = replace(job(Path(sys.argv[1]), {'source': 'digits', 'image_size': 8}),"
        " resources=ResourcesConfig(labels=('zone=in(west,north)',)))\n"
        "backend.submit(west)\n"
        "early = [outcome for _ in range(20) for outcome in backend.poll(0.2)]\n"
        "cluster.add_node(num_cpus=1, labels={'zone': 'west'})\n"
        "ended = []\n"
        "while not ended: ended = backend.poll(0.2)\n"
        "print(json.dumps([len(early), ended[0].state])); backend.close(); cluster.shutdown()"
    )
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout.splitlines()[-1:] == ['[0, "finished"]'], done.stderr[-2000:]


@pytest.fixture(scope="module")
def listeners_before():
    return open_listeners()


@pytest.fixture(scope="module")
def backend(listeners_before):
    with open_backend(ComputeConfig(cpus=1), RunFolder(Path())) as ray_backend:
        yield ray_backend


def test_embedded_cluster_listens_on_loopback_only(backend, listeners_before, tmp_path):
    backend.submit(job(tmp_path, {"source": "digits", "image_size": 8}))
    assert wait(backend)[0].state == "finished"
    assert open_listeners() - listeners_before == set()


def test_stage_error_is_permanent_failure(backend, tmp_path):
    backend.submit(job(tmp_path, {"source": "digits", "image_size": 9}))
    outcome = wait(backend)[0]
    assert (outcome.state, outcome.transient) == ("failed", False)
    assert "MixedSizes" in outcome.error


def test_unknown_stage_kind_is_named_failure(backend, tmp_path):
    backend.submit(job(tmp_path, {}, kind="nonsense"))
    outcome = wait(backend)[0]
    assert outcome.state == "failed" and "nonsense" in outcome.error


def test_submit_too_many_gpus_is_an_error(backend, tmp_path):
    greedy = replace(job(tmp_path, {}), resources=ResourcesConfig(gpus=3))
    with pytest.raises(ConfigError, match="needs 3 GPU.*compute.gpus"):
        backend.submit(greedy)


def test_killed_worker_is_lost(backend, tmp_path):
    backend.submit(job(tmp_path, {"source": "fashion"}))
    while not (tmp_path / "attempt_1" / "worker.json").exists():
        assert not backend.poll(0.01)
    assert backend.place(job(tmp_path, {}, attempt=2)) is None  # the one CPU is in use
    backend.kill("dataset")
    outcome = wait(backend)[0]
    assert backend.place(job(tmp_path, {}, attempt=2)) is not None
    assert (outcome.state, outcome.transient) == ("lost", True)


@pytest.mark.integration
def test_embedded_cluster_ends_with_its_process():
    code = (
        "import os; from pathlib import Path; from orchestrator.config.compute import ComputeConfig\n"
        "from orchestrator.controller import open_backend; from orchestrator.run.run_folder import RunFolder\n"
        "with open_backend(ComputeConfig(cpus=1), RunFolder(Path())): print('up', flush=True); os.kill(os.getpid(), 9)"
    )
    mark = f"ddm-test-{os.getpid()}"
    environment = os.environ | {"DDM_MARK": mark}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert process.stdout == "up\n"
    deadline = time.monotonic() + 120  # Ray's agents poll for their raylet, less often on a busy machine
    while time.monotonic() < deadline:
        running = [entry for entry in Path("/proc").glob("[0-9]*") if mark.encode() in _environment(entry)]
        if not running:
            return
        time.sleep(0.2)
    raise AssertionError(f"still running two minutes later: {running}")


def _environment(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("backend", ["ray", "islands"])
def test_security_is_configured_before_ray_import(backend, tmp_path):
    """Each backend runs in a separate process that ends where Ray would be imported."""
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
    environment = {name: value for name, value in os.environ.items() if name not in switches}
    command = [sys.executable, "-c", code, backend, *switches]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[3])
    assert process.stdout == "True True True\n", process.stderr


def test_security_after_ray_import_is_an_error(monkeypatch):
    import ray  # noqa: F401

    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    with pytest.raises(OrchestratorError, match="must be set before Ray is imported"):
        configure_ray_security(None)
