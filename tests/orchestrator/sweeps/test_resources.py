"""Shared resources of trials: one environment without side effects, and a running Ray cluster if there is one."""

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
from orchestrator.sweeps.resources import open_shared_resources

ADDRESS = "127.0.1.93:6493"

SCRIPT = """
import sys
from pathlib import Path
from orchestrator.config.compute import ComputeConfig
from orchestrator.config.schema import RunConfig
from orchestrator.controller import open_backend
from orchestrator.controller import LOOPBACK_ONLY
from orchestrator.errors import OrchestratorError
from orchestrator.run.run_folder import RunFolder
from orchestrator.sweeps.resources import open_shared_resources
from tests.orchestrator.backends.test_ray_tasks import job, wait
compute = ComputeConfig(address=sys.argv[1])
try:
    with open_backend(compute, RunFolder(Path(sys.argv[2]))) as backend:
        backend.submit(job(Path(sys.argv[2]), {"source": "digits", "image_size": 8}))
        print(wait(backend)[0].state)
    with open_shared_resources(compute) as shared:
        print(shared.cpus)
except OrchestratorError as error:
    print(error)
"""


def test_environment_without_ray_is_the_sweeps(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    before = dict(os.environ)
    with open_shared_resources(ComputeConfig(backend="inline")) as shared:
        assert shared.cpus == len(os.sched_getaffinity(0))
        assert shared.environment.items() == before.items() - {("HYDRA_FULL_ERROR", "1")}
    assert dict(os.environ) == before


def test_address_without_cluster_fails_quickly(monkeypatch):
    monkeypatch.setenv(LOOPBACK_ONLY, "0")
    started = time.monotonic()
    resources = open_shared_resources(ComputeConfig(address="127.0.1.93:1"))
    with resources as shared, pytest.raises(OrchestratorError, match=r"127\.0\.1\.93:1 .*RAY_AUTH_TOKEN_PATH"):
        _ = shared.cpus
    assert time.monotonic() - started < 5


def with_token(token) -> dict[str, str]:
    """Return our environment with a token file instead of the tests' token."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
    return environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


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


def run_script(folder, token) -> subprocess.Popen:
    environment = with_token(token)
    environment |= {"RAY_NUM_REDIS_GET_RETRIES": "3"}  # Ray tries a wrong token once a second, by itself for 20 s
    command = [sys.executable, "-c", SCRIPT, ADDRESS, str(folder)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


@pytest.mark.integration
def test_only_controllers_with_token_join_a_ray_cluster(ray_cluster, token, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    controllers = [run_script(tmp_path / name, token) for name in "ab"]
    refused = run_script(tmp_path / "c", wrong)
    assert [process.communicate(timeout=200)[0] for process in controllers] == ["finished\n2\n"] * 2
    output = refused.communicate(timeout=200)[0]
    assert "accepts a connection" in output and "RAY_AUTH_TOKEN_PATH" in output and "0000" not in output
