"""The playground in front of a real service on loopback."""

import base64
import contextlib
import json
import socket

import httpx
import pytest
from fastapi.testclient import TestClient

from orchestrator.errors import ConfigError
from orchestrator.ui.facts.catalog import RunCatalog
from orchestrator.ui.playground import MAX_BODY_BYTES, PATH, Service
from orchestrator.ui.server import create_app
from tests.orchestrator.ui.run_folders import serve_images

pytestmark = pytest.mark.integration
BODY = {"prompt": "a boot", "n": 2, "seeds": [3, 4], "stream": True, "partial_images": 2}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with serve_images(tmp_path_factory.mktemp("playground")) as served:
        yield served


def client_of(service, tmp_path, token="", **settings):
    return TestClient(create_app(RunCatalog([tmp_path]), token, service=service), "http://127.0.0.1", **settings)


def events(text):
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


def test_previews_and_images_are_those_of_the_service(service, tmp_path):
    page = client_of(service, tmp_path)
    text = page.get("/playground").text
    assert "tiny" in text and service.key not in text
    answer = page.post(PATH, json=BODY)
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.text)
    assert [event["type"].rpartition(".")[2] for event in found].count("partial_image") == 4
    last = {event["index"]: base64.b64decode(event["b64_json"]) for event in found}
    direct = httpx.post(
        f"{service.address}/v1/images/generations",
        json=BODY | {"stream": False, "partial_images": 0},
        headers={"Authorization": f"Bearer {service.key}"},
    ).json()["data"]
    assert [last[0], last[1]] == [base64.b64decode(image["b64_json"]) for image in direct]


def test_refusals_of_the_service_reach_the_browser(service, tmp_path):
    answer = client_of(service, tmp_path).post(PATH, json=BODY | {"steps": 10**6})
    assert answer.status_code == 400 and "steps must be at most" in answer.json()["error"]["message"]


def test_other_websites_and_large_bodies_are_refused(service, tmp_path):
    page = client_of(service, tmp_path)
    assert page.post(PATH, content=json.dumps(BODY), headers={"Content-Type": "text/plain"}).status_code == 415
    assert page.post(PATH, json=BODY | {"prompt": "a" * MAX_BODY_BYTES}).status_code == 413
    assert page.post("/playground", json=BODY).status_code == 405
    locked = client_of(service, tmp_path, "t" * 32)
    assert locked.post(PATH, json=BODY).status_code == 401 == locked.get("/playground").status_code
    assert client_of(None, tmp_path).get("/playground").status_code == 404
    assert client_of(None, tmp_path).post(PATH, json=BODY).status_code == 405


def test_silent_services_and_wrong_addresses_are_explained(tmp_path):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    page = client_of(Service(address), tmp_path)
    assert "does not answer" in page.get("/playground").text and page.post(PATH, json=BODY).status_code == 502
    for wrong in ("127.0.0.1:8000", "file:///etc/passwd", "http://user:secret@host"):
        with pytest.raises(ConfigError, match="--service"):
            Service.open(wrong, None)
    with pytest.raises(ConfigError, match="unencrypted"):
        Service.open("http://example.com", tmp_path / "key")
