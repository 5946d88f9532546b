"""The service on a real Ray Serve on loopback, as the command starts it, under OpenAI's own client."""

import base64
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from tests.ensemble.text_pipeline import assemble_text_pipeline

pytestmark = pytest.mark.integration


class Server:
    """`ddm serve` as a process of its own."""

    def __init__(self, folder: Path, log: Path) -> None:
        command = [sys.executable, "-m", "orchestrator", "serve", f"tiny={folder}", "--port", "0", "--queue", "20"]
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 200
        while not (found := re.search(r"http://127.0.0.1:(\d+)/v1", log.read_text())):
            assert self.process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        self.port = int(found[1])
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def in_flight(self) -> int:
        return httpx.get(f"{self.url}/healthz").json()["images_in_flight"]

    def sample(self, *seeds: int, **fields: object) -> list[bytes]:
        answer = self.client.images.generate(prompt="a boot", n=len(seeds), extra_body={"seeds": seeds, **fields})
        return [base64.b64decode(image.b64_json) for image in answer.data]

    def find_replicas(self) -> list[int]:
        """Return the processes that sample for this service."""
        return [pid for pid in descendants(self.process.pid) if b"ServeReplica:ddm-denoise" in read(pid, "cmdline")]


def read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def descendants(root: int) -> list[int]:
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    parents = {pid: int((read(pid, "stat").rpartition(b")")[2].split() or [0, 0])[1]) for pid in pids}
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {root})


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("served")
    assemble_text_pipeline(root)
    server = Server(root / "pipeline", root / "log")
    started = descendants(server.process.pid)
    yield server
    server.process.send_signal(signal.SIGINT)
    server.process.wait(60)
    assert not [pid for pid in started if b"ray" in read(pid, "cmdline")]


def test_openais_client_works_unchanged(server):
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    alone, batch = server.sample(3), server.sample(*range(16))
    assert alone == [batch[3]]
    with pytest.raises(openai.BadRequestError, match="every image needs one seed"):
        server.client.images.generate(prompt="a boot", n=2, extra_body={"seeds": [1]})
    with pytest.raises(openai.NotFoundError, match="known: tiny"):
        server.client.images.generate(prompt="a boot", model="gpt-image-1")


def test_a_stream_ends_with_the_image(server):
    stream = server.client.images.generate(prompt="a boot", stream=True, partial_images=2, extra_body={"seeds": [3]})
    events = list(stream)
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "partial_image", "completed"]
    assert base64.b64decode(events[-1].b64_json) == server.sample(3)[0]


def test_no_accepted_request_is_lost_when_replicas_are_killed(server):
    expected = server.sample(*range(8))
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(server.sample, number % 8, steps=60 + number) for number in range(24)]
        (victim,) = server.find_replicas()
        while not any(future.done() for future in futures):
            time.sleep(0.01)
        os.kill(victim, signal.SIGKILL)
        answers = [future.result() for future in futures]
    assert all(len(answer) == 1 for answer in answers)
    assert server.sample(*range(8)) == expected
    assert victim not in server.find_replicas()


def test_the_work_of_a_client_that_left_is_dropped(server):
    body = b'{"prompt": "a boot", "n": 16, "steps": 100}'
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        while not server.in_flight():
            time.sleep(0.01)
    while server.in_flight():
        time.sleep(0.01)
    assert 'status="499"' in httpx.get(f"{server.url}/metrics").text
    assert len(server.sample(1)) == 1
