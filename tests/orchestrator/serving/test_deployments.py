"""The service on a real Ray Serve on loopback, as the command starts it, under OpenAI's own client."""

import base64
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from benchmarks.testbed.served import ServedProcess, read_process, serve
from orchestrator.islands.local.clusters import LocalIslands
from orchestrator.islands.local.processes import TOKEN
from tests.ensemble.text_pipeline import assemble_text_pipeline

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


class Client:
    """OpenAI's client of a service."""

    def __init__(self, service: ServedProcess) -> None:
        self.service, self.url = service, service.url
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def in_flight(self) -> int:
        return httpx.get(f"{self.url}/healthz").json()["images_in_flight"]

    def sample(self, *seeds: int, **fields: object) -> list[bytes]:
        answer = self.client.images.generate(prompt="a boot", n=len(seeds), extra_body={"seeds": seeds, **fields})
        return [base64.b64decode(image.b64_json) for image in answer.data]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("served")
    assemble_text_pipeline(root)
    return root


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Client]:
    with serve(folder, "--queue", "20") as service:
        started = service.descendants()
        yield Client(service)
    assert not [pid for pid in started if b"ray" in read_process(pid, "cmdline")]


def test_openais_client_works_unchanged(server):
    assert [model.id for model in server.client.models.list()] == ["model"]
    alone, batch = server.sample(3), server.sample(*range(16))
    assert alone == [batch[3]]
    with pytest.raises(openai.BadRequestError, match="every image needs one seed"):
        server.client.images.generate(prompt="a boot", n=2, extra_body={"seeds": [1]})
    with pytest.raises(openai.NotFoundError, match="known: model"):
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
        (victim,) = server.service.find_replicas("denoise")
        while not any(future.done() for future in futures):
            time.sleep(0.01)
        os.kill(victim, signal.SIGKILL)
        answers = [future.result() for future in futures]
    assert all(len(answer) == 1 for answer in answers)
    assert server.sample(*range(8)) == expected
    assert victim not in server.service.find_replicas("denoise")


def test_the_work_of_a_client_that_left_is_dropped(server):
    body = b'{"prompt": "a boot", "n": 16, "steps": 100}'
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        while not server.in_flight():
            time.sleep(0.01)
    while server.in_flight():
        time.sleep(0.01)
    assert 'status="499"' in httpx.get(f"{server.url}/metrics").text
    assert len(server.sample(1)) == 1


def test_replicas_end_when_idle_and_the_next_requests_start_them(server, folder):
    with serve(folder, "--replicas", "0-2", "--idle", "1") as service:
        client = Client(service)
        for seeds in (range(4), range(8)):
            while service.find_replicas("denoise"):
                time.sleep(0.1)
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(client.sample, seeds))
            assert [answer[0] for answer in answers] == server.sample(*seeds)


def test_a_service_on_a_running_cluster_leaves_others_alone(server, folder, tmp_path, monkeypatch):
    with LocalIslands(tmp_path, count=1, cpus=4) as islands:
        head = islands._heads["island_1"]
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.folder / TOKEN))
        monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
        options = ("--address", f"127.0.0.1:{head.first_port}")
        with serve(folder, *options) as first:
            with serve(folder, *options) as second:
                assert Client(second).sample(3) == server.sample(3)
            assert Client(first).sample(3, 4) == server.sample(3, 4)
