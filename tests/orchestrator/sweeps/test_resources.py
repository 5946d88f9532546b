"""What trials share: one environment without side effects, and a running Ray cluster if there is one."""

import os
import secrets
import signal
import subprocess
import sys
import time

import pytest

from orchestrator.config.compute import ComputeConfig
from orchestrator.controller import LOOPBACK_ONLY
from orchestrator.errors import OrchestratorError
from orchestrator.sweeps.resources import shared_budget

ADDRESS = "127.0.1.93:6493"

WALK = """
import sys
from pathlib import Path
from orchestrator.config.compute import ComputeConfig
from orchestrator.config.schema import RunConfig
from orchestrator.controller import _backend
from orchestrator.controller import LOOPBACK_ONLY
from orchestrator.errors import OrchestratorError
from orchestrator.run.run_folder import RunFolder
from orchestrator.sweeps.resources import shared_budget
from tests.orchestrator.backends.test_ray_tasks import job, wait
compute = ComputeConfig(address=sys.argv[1])
try:
    with _backend(compute, RunFolder(Path(sys.argv[2]))) as backend:
        backend.submit(job(Path(sys.argv[2]), {"source": "digits", "image_size": 8}))
        print(wait(backend)[0].state)
    with shared_budget(compute) as budget:
        print(budget.cpus)
except OrchestratorError as error:
    print(error)
"""


def test_without_ray_the_environment_is_that_of_the_sweep(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    before = dict(os.environ)
    with shared_budget(ComputeConfig(backend="inline")) as budget:
        assert budget.cpus == len(os.sched_getaffinity(0))
        assert budget.environment.items() == before.items() - {("HYDRA_FULL_ERROR", "1")}
    assert dict(os.environ) == before


def test_where_nobody_listens_is_known_at_once(monkeypatch):
    monkeypatch.setenv(LOOPBACK_ONLY, "0")
    started = time.monotonic()
    nobody = shared_budget(ComputeConfig(address="127.0.1.93:1"))
    with nobody as budget, pytest.raises(OrchestratorError, match=r"127\.0\.1\.93:1 .*RAY_AUTH_TOKEN_PATH"):
        _ = budget.cpus
    assert time.monotonic() - started < 5


def with_token(token) -> dict[str, str]:
    """Our environment with a token's file instead of the token that the tests have."""
    ours = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
    return ours | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


@pytest.fixture(scope="module")
def token(tmp_path_factory):
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text(secrets.token_hex(32))
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory, token):
    host, _, port = ADDRESS.partition(":")
    command = ["ray", "start", "--head", "--block", f"--node-ip-address={host}", f"--port={port}", "--num-cpus=2"]
    command += ["--include-dashboard=false", "--object-store-memory=100000000", "--disable-usage-stats"]
    folder = tmp_path_factory.mktemp("head")
    environment = with_token(token)
    with (folder / "log").open("w") as log:
        head = subprocess.Popen(
            [os.path.join(os.path.dirname(sys.executable), command[0]), *command[1:]],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
    deadline = time.monotonic() + 120
    while "Ray runtime started" not in (folder / "log").read_text():
        assert head.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.1)
    yield ADDRESS
    os.killpg(head.pid, signal.SIGKILL)
    head.wait(timeout=60)


def walk(folder, token) -> subprocess.Popen:
    environment = with_token(token)
    environment |= {"RAY_NUM_REDIS_GET_RETRIES": "3"}  # Ray tries a wrong token once a second, by itself for 20 s
    command = [sys.executable, "-c", WALK, ADDRESS, str(folder)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


@pytest.mark.slow
def test_controllers_at_once_join_one_running_ray_cluster_with_its_token_and_nobody_without(
    ray_cluster, token, tmp_path
):
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    walks = [walk(tmp_path / name, token) for name in "ab"]
    refused = walk(tmp_path / "c", wrong)
    assert [process.communicate(timeout=200)[0] for process in walks] == ["finished\n2\n"] * 2
    said = refused.communicate(timeout=200)[0]
    assert "lets us in" in said and "RAY_AUTH_TOKEN_PATH" in said and "0000" not in said
