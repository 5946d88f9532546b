"""The service over its HTTP interface, in this process, on an ensemble of random experts."""

import asyncio
import base64
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image

from ensemble.config import SamplingConfig
from experts.expert import Expert
from experts.networks.lora import LoraLayerWeights, save_lora
from experts.training.lora_training import choose_layers
from orchestrator.serving.app import create_app
from orchestrator.serving.backend import LocalBackend
from orchestrator.serving.config import Batching, Limits, ServiceConfig
from orchestrator.serving.keys import ApiKeys
from orchestrator.serving.sources import ModelSource
from tests.ensemble.text_pipeline import assemble_text_pipeline

CONFIG = ServiceConfig(limits=Limits(images=16, queue=40))
SAMPLING = SamplingConfig(steps=3, guidance_scale=2.0)
PATH = "/v1/images/generations"
Adapters = Mapping[str, Mapping[int, Path]]
NONE: Adapters = {}


class Service:
    """The application of a fresh backend, and requests to it in one event loop."""

    def __init__(
        self, folder: Path, config: ServiceConfig = CONFIG, key_file: Path | None = None, adapters: Adapters = NONE
    ) -> None:
        source = ModelSource(name="tiny", folder=folder, sampling=SAMPLING, adapters=adapters)
        keys = ApiKeys.read(key_file) if key_file else ApiKeys()
        self.app, self.runner = create_app(LocalBackend([source], config.batching), config, keys), asyncio.Runner()

    def send(self, *bodies: dict[str, object], headers: dict[str, str] | None = None) -> list[httpx.Response]:
        """Send all requests at once and return the responses in order."""
        return self.run(lambda client: [client.post(PATH, json=body) for body in bodies], headers)

    def get(self, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
        return self.run(lambda client: [client.get(path)], headers)[0]

    def run(self, requests, headers) -> list[httpx.Response]:
        async def run() -> list[httpx.Response]:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
                return await asyncio.gather(*requests(client))

        return self.runner.run(run())


def files(response: httpx.Response) -> list[bytes]:
    assert response.status_code == 200, response.text
    return [base64.b64decode(image["b64_json"]) for image in response.json()["data"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("served")
    assemble_text_pipeline(root)
    return root / "pipeline"


@pytest.fixture(scope="module")
def service(folder) -> Iterator[Service]:
    return Service(folder)


@pytest.mark.parametrize("selection", ["sticky", "full", "top_k", "sticky_resample"])
def test_an_image_depends_on_its_seed_alone_to_the_byte(folder, service, selection):
    body = {"prompt": "a boot", "selection": selection}
    batch = files(service.send(body | {"n": 16, "seeds": list(range(16))})[0])
    alone = [files(service.send(body | {"seeds": [seed]})[0])[0] for seed in (0, 7, 15)]
    assert alone == [batch[0], batch[7], batch[15]]
    mixed = service.send(*({"prompt": ["a shirt", "a boot"][seed % 2]} | body_of(selection, seed) for seed in range(8)))
    assert [files(response)[0] for response in mixed][1::2] == batch[1:8:2]
    restarted = Service(folder, replace(CONFIG, batching=Batching(max_images=5, resident=1)))
    assert files(restarted.send(body | {"n": 3, "seeds": [7, 0, 15]})[0]) == [batch[7], batch[0], batch[15]]
    assert len(set(batch)) == 16


@pytest.mark.parametrize("selection", ["sticky", "full"])
def test_an_adapter_changes_its_requests_alone(folder, tmp_path, selection):
    """Requests with two adapters and without are mixed; the second adapter is of expert 1 alone."""
    seeds = range(8, 16)
    write_adapter(folder / "expert_0", tmp_path / "first", 0)
    write_adapter(folder / "expert_1", tmp_path / "second", 1)
    first, second = dict.fromkeys((0, 1), tmp_path / "first"), {1: tmp_path / "second"}
    config = replace(CONFIG, batching=Batching(resident=1 if selection == "sticky" else None, max_images=8))
    service = Service(folder, config, adapters={"first": first, "second": second})
    models = [model["id"] for model in service.get("/v1/models").json()["data"]]
    assert models == ["tiny", "tiny:first", "tiny:second"]

    def body(adapter: str | None, *own: int) -> dict[str, object]:
        return {"prompt": "a boot", "selection": selection, "n": len(own), "seeds": own, "adapter": adapter}

    mixed = service.send(*(body(adapter, seed) for seed in seeds for adapter in (None, "first", "second")))
    mixed += service.send(body(None, *seeds), {**body(None, *seeds), "model": "tiny:first"})
    plain, one, two = ([files(response)[0] for response in mixed[k:24:3]] for k in range(3))
    assert (files(mixed[24]), files(mixed[25])) == (plain, one)
    assert plain == files(Service(folder).send(body(None, *seeds))[0])
    assert one == files(Service(folder, adapters={"only": first}).send(body("only", *seeds))[0])
    is_adapted = [image["expert"] in (1, -1) for image in mixed[24].json()["data"]]
    assert [a != b for a, b in zip(plain, two, strict=True)] == is_adapted and any(is_adapted)
    assert not set(plain) & set(one)
    (refused,) = service.send(body("third", 0))
    assert refused.status_code == 400 and "one of first, second" in refused.json()["error"]["message"]


def write_adapter(expert: Path, folder: Path, seed: int) -> None:
    """Write a random LoRA of all linear layers of an expert."""
    network, generator, lora = Expert.load(expert).model, torch.Generator().manual_seed(seed), {}
    for name in choose_layers(network):
        outputs, inputs = network.get_submodule(name).weight.shape
        down, up = (torch.randn(shape, generator=generator) / 2 for shape in ((2, inputs), (outputs, 2)))
        lora[name] = LoraLayerWeights(down=down, up=up, alpha=2.0)
    save_lora(lora, folder)


def body_of(selection: str, seed: int) -> dict[str, object]:
    return {"selection": selection, "seeds": [seed]}


def test_a_response_is_in_openais_form(service):
    body = {"prompt": "a boot", "n": 2, "seeds": [3, 4], "size": "4x4"}
    b64, url = service.send(body, body | {"response_format": "url", "output_format": "jpeg"})
    assert [image["seed"] for image in b64.json()["data"]] == [3, 4]
    assert {image["expert"] for image in b64.json()["data"]} <= {0, 1}
    assert Image.open(io.BytesIO(files(b64)[0])).size == (4, 4)
    head, _, text = url.json()["data"][0]["url"].partition(",")
    assert head == "data:image/jpeg;base64" and Image.open(io.BytesIO(base64.b64decode(text))).format == "JPEG"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"prompt": "a", "model": "other"}, 404, "model"),
        ({"prompt": "a", "steps": 1000}, 400, "steps"),
        ({"prompt": "a", "guidance_scal": 2}, 400, "guidance_scal"),
        ({"prompt": ["a"]}, 400, "prompt"),
        ({"class_label": "hat"}, 400, "class_label"),
    ],
)
def test_a_wrong_request_is_an_error_in_openais_form(service, body, status, param):
    (response,) = service.send(body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert len(error["message"]) > 10


def test_more_images_than_the_queue_get_429(service):
    bodies = [{"prompt": "a boot", "n": 16, "seeds": list(range(k, k + 16))} for k in range(4)]
    responses = service.send(*bodies)
    assert [response.status_code for response in responses] == [200, 200, 429, 429]
    assert int(responses[2].headers["retry-after"]) >= 1
    assert responses[2].json()["error"]["type"] == "rate_limit_error"
    assert service.get("/healthz").json()["images_in_flight"] == 0


def test_a_request_past_its_deadline_is_dropped(folder):
    service = Service(folder, replace(CONFIG, limits=replace(CONFIG.limits, deadline_s=1e-6)))
    (response,) = service.send({"prompt": "a boot"})
    assert (response.status_code, response.json()["error"]["code"]) == (408, "deadline_exceeded")


def test_a_body_that_is_too_large_is_refused(service):
    (response,) = service.send({"prompt": "a" * CONFIG.limits.body_bytes})
    assert (response.status_code, response.json()["error"]["type"]) == (413, "invalid_request_error")


def test_a_stream_has_previews_and_at_last_the_image(service):
    body = {"prompt": "a boot", "n": 2, "seeds": [3, 4]}
    streamed, whole = service.send(body | {"stream": True, "partial_images": 2}, body)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(block.partition("data: ")[2]) for block in streamed.text.split("\n\n") if block]
    for index, file in enumerate(files(whole)):
        own = [event for event in events if event["index"] == index]
        kinds = [event["type"].removeprefix("image_generation.") for event in own]
        assert kinds == ["partial_image", "partial_image", "completed"]
        pictures = [base64.b64decode(event["b64_json"]) for event in own]
        assert pictures[-1] == file and len(set(pictures)) == 3
    assert service.get("/healthz").json()["images_in_flight"] == 0


def test_an_error_of_a_stream_is_an_event(folder):
    service = Service(folder, replace(CONFIG, limits=replace(CONFIG.limits, deadline_s=1e-6)))
    (response,) = service.send({"prompt": "a boot", "stream": True})
    assert response.text.startswith("event: error") and "deadline_exceeded" in response.text


def test_keys_guard_all_but_health(folder, tmp_path):
    path = tmp_path / "keys"
    path.write_text("k" * 20)
    path.chmod(0o600)
    service, header = Service(folder, key_file=path), {"authorization": "Bearer " + "k" * 20}
    (refused,) = service.send({"prompt": "a boot"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
    assert [service.get(path).status_code for path in ("/v1/models", "/metrics", "/healthz")] == [401, 401, 200]
    assert service.send({"prompt": "a boot"}, headers=header)[0].status_code == 200


def test_a_page_of_another_host_is_refused(service):
    assert service.get("/v1/models", headers={"host": "attacker.example"}).status_code == 400


def test_metrics_have_no_prompt_and_count_images(folder, caplog):
    service = Service(folder)
    with caplog.at_level("DEBUG"):
        service.send({"prompt": "secret words", "n": 3}, {"prompt": "secret words", "steps": 999})
    text = service.get("/metrics").text
    assert 'ddm_images_total{model="tiny"} 3.0' in text
    assert 'ddm_requests_total{model="tiny",status="400"} 1.0' in text
    assert "secret" not in text + caplog.text
    assert "class_label" in service.get("/openapi.json").text
