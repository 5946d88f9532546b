"""Whoever has no token, a wrong one or another island's is refused at every port that we open.

The ports are read from the kernel, the HTTP routes from what the servers say of themselves when they start, and the
gRPC methods from Ray's own protocol, so that nothing is left out because nobody thought of it.
"""

import importlib
import json
import pkgutil
import re
import secrets
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
import ray.core.generated
import requests

from orchestrator.config.compute import ResourcesConfig
from orchestrator.islands.client import IslandClient
from orchestrator.islands.local.processes import MARK, kill_marked, marked_processes
from tests.orchestrator.islands.local.test_clusters import wait_for
from tests.orchestrator.islands.sockets import listeners

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

REFUSALS = {401, 403}

HARMLESS = {
    ("GET", "/"): "the dashboard's page, which holds no data",
    ("GET", "/favicon.ico"): "a picture",
    ("GET", "/static"): "scripts and pictures of the page",
    ("GET", "/api/authentication_mode"): "says that a token is needed",
    ("GET", "/api/gcs_healthz"): "whether it lives",
    ("GET", "/api/healthz"): "whether it lives",
    ("GET", "/api/local_raylet_healthz"): "whether it lives",
    ("GET", "/-/healthz"): "whether it lives",
}
"""What an island answers to whoever asks: nothing that was computed, stored or configured there."""

TRIED = [
    ("GET", "/api/jobs/"),
    ("POST", "/api/jobs/"),
    ("DELETE", "/api/jobs/x"),
    ("POST", "/api/jobs/x/stop"),
    ("POST", "/api/job_agent/jobs/"),
    ("GET", "/api/version"),
    ("GET", "/api/packages/gcs/x.zip"),
    ("PUT", "/api/packages/gcs/x.zip"),
    ("GET", "/api/v0/nodes"),
    ("GET", "/api/v0/logs"),
    ("GET", "/logs/"),
    ("GET", "/metrics"),
    ("POST", "/get_or_create_runtime_env"),
    ("GET", "/worker/traceback"),
]
"""Asked at every HTTP port beside the routes that it has."""

BEYOND = ("Push", "Pull", "FreeObjects")
"""Methods of Ray's object manager, whose protocol is not among its Python files."""


def methods() -> list[str]:
    """Every gRPC method that Ray's protocol has."""
    found = [f"/ray.rpc.ObjectManagerService/{name}" for name in BEYOND]
    for module in pkgutil.iter_modules(ray.core.generated.__path__):
        if module.name.endswith("_pb2"):
            described = importlib.import_module(f"ray.core.generated.{module.name}").DESCRIPTOR
            for service in described.services_by_name.values():
                found += [f"/{service.full_name}/{method.name}" for method in service.methods]
    return found


def routes(logs: Path) -> set[tuple[str, str]]:
    """Every HTTP route that a server has written down when it started, its variables filled in."""
    lines = "\n".join(path.read_text() for path in logs.glob("dashboard*.log"))
    found = re.findall(r"ResourceRoute \[(\w+)\] <\w+Resource\s+(/\S*?)(?:>| ->)", lines)
    return {(method, re.sub(r"\{[^}]*\}", "x", path)) for method, path in found if method != "OPTIONS"}


def speaks_http(port: int) -> bool:
    try:
        requests.get(f"http://127.0.0.1:{port}/", timeout=5)
    except requests.RequestException:
        return False
    return True


def let_in_by_http(port: int, token: str | None, asked: set[tuple[str, str]]) -> list[str]:
    """What was not refused; a route that the server does not have is no way in either."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}", "X-Ray-Authorization": f"Bearer {token}"}
    found = []
    for method, path in sorted(asked - HARMLESS.keys()):
        answer = requests.request(method, f"http://127.0.0.1:{port}{path}", headers=headers, timeout=10, json={})
        if answer.status_code not in REFUSALS:
            found.append(f"{method} {port}{path}: {answer.status_code}")
    return found


def grpc_answers(port: int, token: str | None, asked: list[str]) -> dict[str, str]:
    """What each method answers."""
    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    answers = {}
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for method in asked:
            try:
                channel.unary_unary(method)(b"", timeout=5, metadata=metadata)
            except grpc.RpcError as error:
                answers[method] = error.code().name
            else:
                answers[method] = "OK"
    return answers


def assert_refused(ports: set[int], tokens: dict[str, str | None], known: set[tuple[str, str]]) -> None:
    """Nobody is let in anywhere, and each port has refused something, so that it was spoken to in its language."""
    every_method = methods()
    for port in sorted(ports):
        if speaks_http(port):
            for name, token in tokens.items():
                assert let_in_by_http(port, token, {*TRIED, *known}) == [], name
            continue
        served = every_method
        for name, token in tokens.items():
            answers = grpc_answers(port, token, served)
            served = [method for method, answer in answers.items() if answer != "UNIMPLEMENTED"]
            assert served, f"port {port} knows none of the methods: what is it?"
            assert {answers[method] for method in served} == {"UNAUTHENTICATED"}, (name, port, answers)


@pytest.fixture(scope="module")
def busy(islands, wheel):
    """An island on which a job runs that is itself a part of the Ray cluster, so that it has a port."""
    client = IslandClient("island_1", islands.configs["island_1"])
    code = "import ray, time; ray.init(log_to_driver=False); print('up'); time.sleep(900)"
    client.submit("busy", ["python", "-c", code], wheel=wheel, resources=ResourcesConfig(), env={}, grace_s=1.0)
    wait_for(lambda: "up" in client.log("busy"))
    yield islands
    client.stop("busy")
    wait_for(lambda: client.states()["busy"].has_ended)
    client.delete("busy")


def test_an_island_refuses_strangers_at_every_port(busy):
    token, other = (Path(config.token_file).read_text() for config in busy.configs.values())
    found = listeners(busy.processes("island_1"))
    assert len(found) >= 10 and all(listener.is_loopback for listener in found)
    scratch = json.loads((busy.folder / "island_1" / "island.json").read_text())["scratch"]
    known = routes(Path(scratch) / "ray" / "session_latest" / "logs")
    assert len(known) > 60
    tokens = {"no token": None, "a wrong token": secrets.token_hex(32), "the other island's": other, "half": token[:32]}
    assert_refused({listener.port for listener in found}, tokens, known)


def test_with_its_token_an_island_answers(busy):
    config = busy.configs["island_1"]
    token = Path(config.token_file).read_text()
    headers = {"Authorization": f"Bearer {token}"}
    assert requests.get(f"{config.address}/api/jobs/", headers=headers, timeout=10).status_code == 200
    first = min(listener.port for listener in listeners(busy.processes("island_1")))
    method = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
    assert grpc_answers(first, token, [method]) == {method: "OK"}
    assert grpc_answers(first, None, [method]) == {method: "UNAUTHENTICATED"}


def test_no_process_shows_a_token_in_its_command(busy):
    tokens = [Path(config.token_file).read_bytes() for config in busy.configs.values()]
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for name in busy.configs for pid in busy.processes(name)]
    logs = [path.read_bytes() for path in busy.folder.glob("*/head.log")]
    assert len(commands) > 20 and not [text for text in commands + logs for token in tokens if token in text]


def test_the_embedded_ray_cluster_refuses_strangers_at_every_port(tmp_path):
    code = (
        "from pathlib import Path; from orchestrator.config.compute import ComputeConfig\n"
        "from orchestrator.controller import _backend; from orchestrator.run.run_folder import RunFolder\n"
        "with _backend(ComputeConfig(cpus=1), RunFolder(Path())): print('up', flush=True); input()"
    )
    mark = str(tmp_path)
    environment = {MARK: mark, "HOME": mark, "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(filter(None, sys.path))}
    words = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, env=environment, cwd=tmp_path, start_new_session=True, **pipes) as owner:
        try:
            assert owner.stdout is not None and owner.stdout.readline() == b"up\n"
            found = listeners(marked_processes(mark))
            assert len(found) >= 5 and all(listener.is_loopback for listener in found)
            tokens = {"no token": None, "a wrong token": secrets.token_hex(32)}
            assert_refused({listener.port for listener in found}, tokens, set())
        finally:
            kill_marked(mark)
