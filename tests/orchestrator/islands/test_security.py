"""Every open port refuses requests with no token, a wrong one or another island's.

The ports come from the kernel, the HTTP routes from the servers' logs, and the gRPC methods from Ray's protocol. So the
test needs no list of them.
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
from orchestrator.run.marked_processes import MARK, find_marked_processes, kill_marked_processes
from tests.orchestrator.islands.local.test_clusters import wait_for
from tests.orchestrator.islands.sockets import list_listeners

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

REFUSALS = {401, 403}

HARMLESS = {
    ("GET", "/"): "the dashboard's page, which has no data",
    ("GET", "/favicon.ico"): "a picture",
    ("GET", "/static"): "scripts and pictures of the page",
    ("GET", "/api/authentication_mode"): "reports that a token is needed",
    ("GET", "/api/gcs_healthz"): "a health check",
    ("GET", "/api/healthz"): "a health check",
    ("GET", "/api/local_raylet_healthz"): "a health check",
    ("GET", "/-/healthz"): "a health check",
}
"""Routes without authentication: they return nothing that was computed, stored or configured there."""

EXTRA_ROUTES = [
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
"""Routes to request at every HTTP port besides its own routes."""

OBJECT_MANAGER_METHODS = ("Push", "Pull", "FreeObjects")
"""Methods of Ray's object manager, whose protocol is not in its Python files."""


def list_grpc_methods() -> list[str]:
    """Return every gRPC method of Ray's protocol."""
    methods = [f"/ray.rpc.ObjectManagerService/{name}" for name in OBJECT_MANAGER_METHODS]
    for module in pkgutil.iter_modules(ray.core.generated.__path__):
        if module.name.endswith("_pb2"):
            descriptor = importlib.import_module(f"ray.core.generated.{module.name}").DESCRIPTOR
            for service in descriptor.services_by_name.values():
                methods += [f"/{service.full_name}/{method.name}" for method in service.methods]
    return methods


def list_http_routes(logs: Path) -> set[tuple[str, str]]:
    """Return every HTTP route in the servers' logs, with its variables replaced."""
    lines = "\n".join(path.read_text() for path in logs.glob("dashboard*.log"))
    matches = re.findall(r"ResourceRoute \[(\w+)\] <\w+Resource\s+(/\S*?)(?:>| ->)", lines)
    return {(method, re.sub(r"\{[^}]*\}", "x", path)) for method, path in matches if method != "OPTIONS"}


def serves_http(port: int) -> bool:
    try:
        requests.get(f"http://127.0.0.1:{port}/", timeout=5)
    except requests.RequestException:
        return False
    return True


def list_accepted_http(port: int, token: str | None, routes: set[tuple[str, str]]) -> list[str]:
    """Return the requests that were not refused; an absent route must be refused too."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}", "X-Ray-Authorization": f"Bearer {token}"}
    accepted = []
    for method, path in sorted(routes - HARMLESS.keys()):
        response = requests.request(method, f"http://127.0.0.1:{port}{path}", headers=headers, timeout=10, json={})
        if response.status_code not in REFUSALS:
            accepted.append(f"{method} {port}{path}: {response.status_code}")
    return accepted


def call_grpc(port: int, token: str | None, methods: list[str]) -> dict[str, str]:
    """Return the status code of each method."""
    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    codes = {}
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for method in methods:
            try:
                channel.unary_unary(method)(b"", timeout=5, metadata=metadata)
            except grpc.RpcError as error:
                codes[method] = error.code().name
            else:
                codes[method] = "OK"
    return codes


def assert_refused(ports: set[int], tokens: dict[str, str | None], routes: set[tuple[str, str]]) -> None:
    """Assert that every port refuses every token, and that each port serves HTTP or at least one gRPC method."""
    all_methods = list_grpc_methods()
    for port in sorted(ports):
        if serves_http(port):
            for name, token in tokens.items():
                assert list_accepted_http(port, token, {*EXTRA_ROUTES, *routes}) == [], name
            continue
        served = all_methods
        for name, token in tokens.items():
            codes = call_grpc(port, token, served)
            served = [method for method, code in codes.items() if code != "UNIMPLEMENTED"]
            assert served, f"port {port} serves neither HTTP nor any known gRPC method"
            assert {codes[method] for method in served} == {"UNAUTHENTICATED"}, (name, port, codes)


@pytest.fixture(scope="module")
def busy_islands(islands, wheel):
    """Yield islands with a job on island_1 that connects to the Ray cluster, so it has a port."""
    client = IslandClient("island_1", islands.configs["island_1"])
    code = "import ray, time; ray.init(log_to_driver=False); print('up'); time.sleep(900)"
    client.submit("busy", ["python", "-c", code], wheel=wheel, resources=ResourcesConfig(), env={}, grace_s=1.0)
    wait_for(lambda: "up" in client.fetch_log("busy"))
    yield islands
    client.stop("busy")
    wait_for(lambda: client.list_states()["busy"].has_ended)
    client.delete("busy")


def test_island_without_its_token_refuses_at_every_port(busy_islands):
    token, other = (Path(config.token_file).read_text() for config in busy_islands.configs.values())
    sockets = list_listeners(busy_islands.list_processes("island_1"))
    assert len(sockets) >= 10 and all(listener.is_loopback for listener in sockets)
    scratch = json.loads((busy_islands.folder / "island_1" / "island.json").read_text())["scratch"]
    routes = list_http_routes(Path(scratch) / "ray" / "session_latest" / "logs")
    assert len(routes) > 60
    tokens = {"no token": None, "a wrong token": secrets.token_hex(32), "the other island's": other, "half": token[:32]}
    assert_refused({listener.port for listener in sockets}, tokens, routes)


def test_island_with_its_token_responds(busy_islands):
    config = busy_islands.configs["island_1"]
    token = Path(config.token_file).read_text()
    headers = {"Authorization": f"Bearer {token}"}
    assert requests.get(f"{config.address}/api/jobs/", headers=headers, timeout=10).status_code == 200
    first = min(listener.port for listener in list_listeners(busy_islands.list_processes("island_1")))
    method = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
    assert call_grpc(first, token, [method]) == {method: "OK"}
    assert call_grpc(first, None, [method]) == {method: "UNAUTHENTICATED"}


def test_token_is_in_no_command_and_no_log(busy_islands):
    tokens = [Path(config.token_file).read_bytes() for config in busy_islands.configs.values()]
    commands = [
        Path(f"/proc/{pid}/cmdline").read_bytes()
        for name in busy_islands.configs
        for pid in busy_islands.list_processes(name)
    ]
    logs = [path.read_bytes() for path in busy_islands.folder.glob("*/head.log")]
    assert len(commands) > 20 and not [text for text in commands + logs for token in tokens if token in text]


def test_embedded_ray_without_token_refuses_at_every_port(tmp_path):
    code = (
        "from pathlib import Path; from orchestrator.config.compute import ComputeConfig\n"
        "from orchestrator.controller import open_backend; from orchestrator.run.run_folder import RunFolder\n"
        "with open_backend(ComputeConfig(cpus=1), RunFolder(Path())): print('up', flush=True); input()"
    )
    mark = str(tmp_path)
    environment = {MARK: mark, "HOME": mark, "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(filter(None, sys.path))}
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, cwd=tmp_path, start_new_session=True, **pipes) as owner:
        try:
            assert owner.stdout is not None and owner.stdout.readline() == b"up\n"
            sockets = list_listeners(find_marked_processes(mark))
            assert len(sockets) >= 5 and all(listener.is_loopback for listener in sockets)
            tokens = {"no token": None, "a wrong token": secrets.token_hex(32)}
            assert_refused({listener.port for listener in sockets}, tokens, set())
        finally:
            kill_marked_processes(mark)
