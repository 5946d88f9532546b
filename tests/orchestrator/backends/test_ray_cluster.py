"""Ray's own processes are killed: the embedded cluster is started again; a connected one is named."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ddm_core.artifacts import read_json
from orchestrator.backends import ray_cluster
from orchestrator.config.compute import ComputeConfig, ResourcesConfig
from orchestrator.controller import open_backend
from orchestrator.errors import OrchestratorError
from orchestrator.islands.local.clusters import LocalIslands
from orchestrator.islands.local.processes import TOKEN
from orchestrator.run.backend import AttemptOutcome, Job, attempt_folder
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.worker import execute
from orchestrator.run.worker_lock import is_worker
from tests.orchestrator.backends.test_ray_train import TRAINING, job

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]


def make_job(folder: Path, attempt: int, **config) -> Job:
    job = Job(
        stage="dataset",
        kind="dataset",
        config={"source": "fashion"} | config,
        inputs={},
        input_fingerprints={},
        artifact=str(folder / "artifact"),
        scratch=str(folder / "state"),
        attempt=attempt,
        stop_files=(),
        resources=ResourcesConfig(cpus=1),
    )
    attempt_folder(job).mkdir(parents=True)
    return job


def wait_for_outcome(backend) -> AttemptOutcome:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if ended := backend.poll(0.05):
            return ended[0]
    raise AssertionError("nothing ended within four minutes")


def start_worker(backend, job: Job) -> int:
    """Submit a job and return the process id of its worker, which holds the attempt's lock."""
    backend.submit(job)
    folder = attempt_folder(job)
    while True:
        assert not backend.poll(0.01)
        if (folder / "log.txt").exists():
            pid = int(read_json(folder / "worker.json")["pid"])
            assert is_worker(pid, folder)
            return pid


def ray_process(name: str, owner: int) -> int:
    """Return the id of the process of Ray's program `name` that a process has started."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            program = (entry / "cmdline").read_bytes().split(b"\0")[0].decode()
        except OSError:
            continue
        if parent == owner and Path(program).name == name:
            return int(entry.name)
    raise AssertionError(f"no {name} below {owner}")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def temporary(monkeypatch):
    """Use a temporary folder that other clusters on this machine do not share, with a short path."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_dead_embedded_cluster_is_started_again(tmp_path, temporary, monkeypatch):
    monkeypatch.setattr(ray_cluster, "MAX_RESTARTS", 2)
    run = RunFolder(tmp_path)
    with open_backend(ComputeConfig(cpus=1), run) as backend:
        for attempt, name in enumerate(("raylet", "gcs_server"), start=1):
            job = make_job(tmp_path / "work", attempt)
            worker = start_worker(backend, job)
            os.kill(ray_process(name, os.getpid()), signal.SIGKILL)
            outcome = wait_for_outcome(backend)
            assert not is_running(worker)
            assert (outcome.state, outcome.attempt, outcome.uses_retry) == ("lost", attempt, False)
            assert f"{name} (exit code -9) died" in outcome.error and f"({attempt} of 2)" in outcome.error
        assert [event["event"] for event in run.read_events()] == ["ray_restarted"] * 2
        backend.submit(make_job(tmp_path / "work", 3, source="digits", image_size=8))
        assert wait_for_outcome(backend).state == "finished"
        (folder,) = temporary.glob(f"ddm-ray-{os.getuid()}-*")
        os.kill(ray_process("raylet", os.getpid()), signal.SIGKILL)
        deadline = time.monotonic() + 20
        while backend.place(make_job(tmp_path / str(time.monotonic()), 1)) is not None:
            assert time.monotonic() < deadline
        with pytest.raises(OrchestratorError, match="3 times.*raylet.*memory.*compute=inline"):
            wait_for_outcome(backend)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_dead_connected_cluster_is_named(name, tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path; from orchestrator.config.compute import *\n"
        "from orchestrator.backends import ray_cluster; from orchestrator.backends.ray_tasks import RayBackend\n"
        "from orchestrator.errors import OrchestratorError; ray_cluster.SILENCE_S = 3\n"
        "backend = RayBackend(ComputeConfig(address=sys.argv[1])); print('up', flush=True)\n"
        "try:\n"
        "    while True: backend.poll(0.1); time.sleep(0.1)\n"
        "except OrchestratorError as error: print(error, flush=True)\n"
        "backend.close()"
    )
    with LocalIslands(tmp_path, count=1) as islands:
        head = islands._heads["island_1"]
        tokens = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(head.folder / TOKEN)}
        environment = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_TOKEN"} | tokens
        driver = subprocess.Popen(
            [sys.executable, "-c", code, f"127.0.0.1:{head.first_port}"],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert driver.stdout.readline() == "up\n"
            # `ray start --block` would end all other processes after the first, so it goes first.
            victims = islands._running["island_1"].pid, ray_process(name, islands._running["island_1"].pid)
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            output = driver.communicate(timeout=120)[0]
        finally:
            driver.kill()
        assert f"the Ray cluster at 127.0.0.1:{head.first_port} does not respond" in output and name in output
        assert driver.returncode == 0


def test_node_that_registers_late_is_one_message(temporary, monkeypatch):
    """Ray starts the processes, and then does not find the node: twice."""
    import ray._private.services as services

    def never(*_):
        raise RuntimeError("GCS cannot find the node")

    monkeypatch.setattr(services, "get_node", never)
    with pytest.raises(OrchestratorError, match="did not start here, twice: .*timed out.*compute=inline"):
        ray_cluster.RayCluster(ComputeConfig(cpus=1))
    assert not list(temporary.glob(f"ddm-ray-{os.getuid()}-*"))


def test_group_of_workers_ends_with_its_cluster(tmp_path):
    digits = {"source": "digits", "image_size": 8, "limit": 300}
    assert execute(job(tmp_path, "dataset", kind="dataset", config=digits, inputs={})).state == "finished"
    shards = {"shards": str(tmp_path / "dataset" / "train")}
    assert execute(job(tmp_path, "codec", kind="codec", config={"kind": "pixels"}, inputs=shards)).state == "finished"
    training = job(tmp_path, "expert")
    long = {"network": {"kind": "residual_mlp", "width": 64}, "training": TRAINING | {"steps": 10**6}}
    training = replace(training, config={"expert": long, "cluster_id": 0})
    with open_backend(ComputeConfig(cpus=2), RunFolder(tmp_path)) as backend:
        backend.submit(training)
        workers = [attempt_folder(training) / name / "worker.json" for name in ("", "worker_1")]
        while not all(path.exists() for path in workers):
            assert not backend.poll(0.05)
        pids = [int(read_json(path)["pid"]) for path in workers]
        os.kill(ray_process("raylet", os.getpid()), signal.SIGKILL)
        outcome = wait_for_outcome(backend)
        assert (outcome.state, outcome.uses_retry) == ("lost", False)
        assert not any(map(is_running, pids)) and not (attempt_folder(training) / "group").exists()
