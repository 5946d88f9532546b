"""Training from tars that stay where they are (`make bench-streaming`): stalls, resumes, kills, and what is copied.

Images are read from S3 (moto's server on loopback), and from a disk of 50 MB/s that answers after 50 ms, through a
cache of a tenth of the data. The network is simulated by a wait that leaves the CPU to the readers, as a GPU does:
2,000 samples a second.

1. Time in which a step waits for its batch, as a share of all time after the first batch.
2. Random steps, drawn anew with other threads and another cache, against the same steps of one long training.
3. Trainers with their readers, which are threads, killed at random instants: parameters of the last against unkilled.
4. Bytes of a run's folder, without caches, beside those of its tars; with `data.mode=stream` and with `copy`.
"""

import argparse
import hashlib
import io
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import requests
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from benchmarks.record import Claim, Listing, write_result
from benchmarks.testbed.forked_commands import run_killed
from benchmarks.testbed.tiny_run import TINY
from data_partition.config import DataConfig
from data_partition.datasets.build import build_dataset
from data_partition.shards import offset_index
from data_partition.shards.tar import Encoded, TarWriter
from data_partition.shards.urls import read_range
from ddm_core.artifacts import CACHE, Workspace, to_json
from experts.codec import PixelCodec
from experts.config import TrainingConfig
from experts.training.latent_dataset import Batch, LatentDataset, make_batch
from experts.training.latents.divide import divide_latents
from experts.training.latents.encode import encode_dataset
from experts.training.latents.shard_encoder import FrozenCodec
from experts.training.latents.training_set import encode_latents
from experts.training.streaming.batches import BatchesAhead
from experts.training.trainer import fit
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.controller import run_pipeline

SOURCE_SIDE, SIDE = 64, 32
"""Pixels of a side in the tars, and in the training."""
IMAGE_BYTES = 12_500
"""Of one image in a tar, at most."""
LATENCY_S, BYTES_PER_S = 0.05, 50e6
BUCKET, KEYS = (
    "images",
    {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"},
)
CODEC = PixelCodec(image_shape=(SIDE, SIDE, 3))
MAX_STALL, MAX_COPIED = 0.05, 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is read and how often."""

    tars: int = 80
    samples: int = 100
    """Of a tar."""
    steps: int = 160
    batch_size: int = 64
    rate: float = 2000.0
    """Samples a second of the simulated network."""
    resumes: int = 20
    kills: int = 10

    def at(self, rate: float) -> "Size":
        """Return the same for so many samples a second, and as many seconds."""
        return replace(self, rate=rate, steps=max(2, round(self.steps * rate / self.rate)))

    @property
    def training(self) -> TrainingConfig:
        """Return a training with a cache of a tenth of the data: four blocks of a fortieth."""
        block = max(1, self.tars // 40)
        return TrainingConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            shuffle_shards=block,
            cache_gb=max(self.tars / 10, 2 * block) * self.samples * IMAGE_BYTES / 1e9,
            checkpoint_every=5,
        )

    @property
    def data_bytes(self) -> int:
        """Return the bytes of all images."""
        return self.tars * self.samples * IMAGE_BYTES


TINY_SIZE = Size(tars=4, samples=48, steps=6, batch_size=16, rate=400.0, resumes=2, kills=1)


def main() -> None:
    """Measure, write docs/benchmarks/streaming.json and print it; with --tiny only measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a few seconds, which shows that it works")
    parser.add_argument("--rates", type=float, nargs="*", default=[1000, 500, 250], help="further samples a second")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started, size = time.monotonic(), TINY_SIZE if options.tiny else Size()
    with tempfile.TemporaryDirectory() as name:
        claims, listings = measure(Path(name), size, [] if options.tiny else options.rates)
    notes = [
        f"Load of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, which other work shares.",
        "Readers are threads of the trainer: whatever kills one kills both.",
    ]
    if options.tiny:
        print(to_json(claims))
    else:
        print(to_json(write_result("streaming", time.monotonic() - started, claims, listings, notes)))


def measure(folder: Path, size: Size, rates: Sequence[float] = ()) -> tuple[list[Claim], list[Listing]]:
    """Measure everything in an empty folder."""
    write_tars(folder / "tars", size)
    claims, rows, names = [], [], f"{{00..{size.tars - 1:02d}}}.tar"
    with s3_server(folder / "tars") as url:
        for name, path in (("S3", url), ("slow disk", f"{folder}/tars")):
            with nullcontext() if name == "S3" else slow_disk():
                dataset = open_dataset(folder / name.replace(" ", "_"), f"{path}/{names}")
                for rate in (size.rate, *rates):
                    stall, figures = measure_stall(dataset, size.at(rate), folder / "cache")
                    rows.append((name, f"{rate:g}", f"{stall:.3f}", *figures))
                    if rate == size.rate:
                        claims.append(
                            Claim(
                                name=f"{name}: share of the time that steps wait, at {rate:g} samples/s",
                                bar=f"≤ {MAX_STALL}",
                                value=f"{stall:.3f}",
                                spread="",
                                holds=stall <= MAX_STALL,
                            )
                        )
                claims.append(
                    count_claim(f"{name}: random resumes", count_equal_resumes(dataset, size, folder), size.resumes)
                )
    with slow_disk():
        equal = count_equal_after_kill(folder, size)
    claims.append(count_claim("trainer and its readers killed at random instants: same parameters", equal, size.kills))
    copied = {mode: measure_copies(folder, size, mode) for mode in ("stream", "copy")}
    total = sum(copied["stream"].values())
    claims.append(
        Claim(
            name="bytes that a run keeps, without caches, for each byte more of its tars, data.mode=stream",
            bar=f"≤ {MAX_COPIED}",
            value=f"{total:.3f}",
            spread=f"copy: {sum(copied['copy'].values()):.3f}",
            holds=total <= MAX_COPIED,
        )
    )
    stages = sorted(set(copied["copy"]) | set(copied["stream"]))
    bytes_rows = [(name, *(f"{copied[mode].get(name, 0):.4f}" for mode in ("stream", "copy"))) for name in stages]
    columns = ("source", "samples/s", "waits", "first batch s", "CPU ms a sample", "most cache / tars")
    kept = Listing(
        title="Bytes that stages keep for each byte of the tars", columns=("stage", "stream", "copy"), rows=bytes_rows
    )
    return claims, [Listing(title="Speeds", columns=columns, rows=rows), kept]


def count_claim(name: str, count: int, total: int) -> Claim:
    """Return the claim that all of them are equal."""
    return Claim(name=name, bar=f"{total} of {total}", value=f"{count} of {total}", spread="", holds=count == total)


def write_tars(folder: Path, size: Size) -> None:
    """Write tars of PNGs of noise, 12 KB each, of two kinds of brightness."""
    folder.mkdir()
    for tar in range(size.tars):
        draws, writer = np.random.default_rng(tar), TarWriter(folder / f"{tar:02d}.tar")
        for number in range(size.samples):
            pixels = draws.integers(0, 128, (SOURCE_SIDE, SOURCE_SIDE, 3), np.uint8) + 127 * (number % 2)
            buffer = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="PNG", compress_level=0)
            writer.add(Encoded(key=f"{tar:02d}-{number:05d}", files={"png": buffer.getvalue()}))
        writer.close()


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Start moto's server on loopback with the tars of a folder in a bucket; yield its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    os.environ |= {**KEYS, "AWS_ENDPOINT_URL": address, "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", address.rpartition(":")[2]]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(address)
        for path in sorted(folder.iterdir()):
            requests.put(f"{address}/{BUCKET}/{path.name}", data=path.read_bytes(), timeout=60).raise_for_status()
        yield f"s3://{BUCKET}"
    finally:
        server.terminate()
        server.wait()


def _wait_for(address: str) -> None:
    """Create the bucket, once the server answers."""
    for _ in range(600):
        try:
            requests.put(f"{address}/{BUCKET}", timeout=10).raise_for_status()
        except requests.ConnectionError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"moto's server did not start at {address}")


@contextmanager
def slow_disk() -> Iterator[None]:
    """Make every range of a file wait for the latency, and all of them share the bytes per second."""
    lock = threading.Lock()

    def read_slowly(url: str, start: int, stop: int) -> bytes:
        time.sleep(LATENCY_S)
        with lock:
            time.sleep((stop - start) / BYTES_PER_S)
        return read_range(url, start, stop)

    with patch.object(offset_index, "read_range", read_slowly):
        yield


def open_dataset(folder: Path, path: str) -> LatentDataset:
    """Index tars, and return their samples without stored latents."""
    config = DataConfig(
        source="webdataset",
        mode="stream",
        path=path,
        image_size=SIDE,
        channels=3,
        fit="crop",
        labels=False,
        holdout=0.02,
    )
    build_dataset(config, folder / "dataset", Workspace.at(folder / "reading"))
    (folder / "codec").mkdir()
    CODEC.save(folder / "codec")
    codec = FrozenCodec.open(folder / "codec", CODEC)
    encode_dataset(
        folder / "dataset", codec, None, folder / "latents", Workspace.at(folder / "encoding"), stores_latents=False
    )
    divide_latents(folder / "latents" / "train", [folder / "dataset" / "train"], folder / "divided")
    return reopen(folder)


def reopen(folder: Path) -> LatentDataset:
    """Return the samples of `open_dataset` again."""
    return encode_latents([folder / "divided" / "0"], CODEC, folder / "codec", Workspace.at(folder / "opening"))


def measure_stall(dataset: LatentDataset, size: Size, cache: Path) -> tuple[float, tuple[str, str, str]]:
    """Return the share of waiting, and as text: seconds to the first batch, CPU ms a sample, largest cache / data."""
    shutil.rmtree(cache, ignore_errors=True)
    config, step_s = size.training, size.batch_size / size.rate
    waited, most_bytes, cpu = 0.0, 0, time.process_time()
    started = time.perf_counter()
    with dataset.reading(config, cache), BatchesAhead(config.steps, torch.device("cpu"), are_read=True) as batches:
        for step in range(config.steps):
            asked = time.perf_counter()
            batches.take(step, lambda step: make_batch(dataset, config, step))
            if step == 0:
                first_s = time.perf_counter() - started
                started = time.perf_counter()
            else:
                waited += time.perf_counter() - asked
            most_bytes = max(most_bytes, sum(map(file_bytes, cache.iterdir())))
            time.sleep(step_s)
    cpu_ms = 1e3 * (time.process_time() - cpu) / (config.steps * size.batch_size)
    return waited / (time.perf_counter() - started), (
        f"{first_s:.1f}",
        f"{cpu_ms:.2f}",
        f"{most_bytes / size.data_bytes:.3f}",
    )


def file_bytes(path: Path) -> int:
    """Return the size of a file of a cache, which may be renamed or removed meanwhile."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def fingerprint(batch: Batch) -> str:
    """Return a hash of the images and the noise of a batch."""
    return hashlib.sha256(batch.clean.numpy().tobytes() + batch.noise.numpy().tobytes()).hexdigest()


def count_equal_resumes(dataset: LatentDataset, size: Size, folder: Path) -> int:
    """Return how many random steps have the batches that they have in one long training, whatever reads them."""
    with dataset.reading(size.training, folder / "cache"):
        whole = [fingerprint(make_batch(dataset, size.training, step)) for step in range(size.steps)]
    equal, draws = 0, random.Random(0)
    for number in range(size.resumes):
        step, cache_gb = draws.randrange(size.steps), draws.choice([0.0, size.training.cache_gb, 1.0])
        config = replace(size.training, readers=draws.randint(1, 8), cache_gb=cache_gb)
        with dataset.reading(config, folder / f"cache_{number}"):
            equal += fingerprint(make_batch(dataset, config, step)) == whole[step]
        shutil.rmtree(folder / f"cache_{number}", ignore_errors=True)
    return equal


class Mean(nn.Module):
    """A network of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * SIDE * SIDE, 1)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return a loss that every image changes."""
        loss: torch.Tensor = (self.layer(batch.clean.flatten(1)) - 1).square().mean()
        return loss


def train(folder: Path, size: Size, scratch: Path) -> None:
    """Train in this process, from its last checkpoint, and write the parameters when it ends."""
    config = replace(size.training, steps=min(size.steps, 20), batch_size=min(size.batch_size, 64))
    torch.manual_seed(0)
    result = fit(Mean(), lambda model, batch: model(batch), reopen(folder), config, Workspace.at(scratch))
    (scratch / "parameters").write_bytes(next(result.model.parameters()).detach().numpy().tobytes())


def count_equal_after_kill(folder: Path, size: Size) -> int:
    """Return how many trainings, each killed once at a random instant, end with the parameters of an unkilled one."""
    source = folder / "slow_disk"
    started = time.monotonic()
    _fork(source, size, folder / "unkilled", None)
    seconds = time.monotonic() - started
    equal, draws = 0, random.Random(1)
    for number in range(size.kills):
        scratch = folder / f"killed_{number}"
        _fork(source, size, scratch, draws.random() * seconds)
        _fork(source, size, scratch, None)
        equal += (scratch / "parameters").read_bytes() == (folder / "unkilled" / "parameters").read_bytes()
    return equal


def _fork(source: Path, size: Size, scratch: Path, kill_after_s: float | None) -> None:
    """Train in a child process, which is killed after some seconds."""
    run_killed(lambda: train(source, size, scratch), scratch.with_suffix(".log"), kill_after_s)


def measure_copies(folder: Path, size: Size, mode: str) -> dict[str, float]:
    """Return, by stage, how many bytes a run keeps for each byte that its tars have more: of 8 tars against 4."""
    counts = (4, 8) if size.tars >= 8 else (2, 4)
    small, large = (run_bytes(folder, count, mode) for count in counts)
    paths = sorted((folder / "tars").iterdir())[counts[0] : counts[1]]
    added = sum(path.stat().st_size for path in paths)
    return {name: (total - small.get(name, 0)) / added for name, total in large.items()}


def run_bytes(folder: Path, count: int, mode: str) -> dict[str, int]:
    """Run the smallest pipeline on some tars; return the bytes of its folder by stage, without caches."""
    run = folder / f"run_{mode}_{count}"
    settings = (
        *(setting for setting in TINY if setting != "data.limit=160"),
        *("data=webdataset", f"data.mode={mode}", "data.labels=false", "data.holdout=0.2"),
        *(f'data.path="{folder}/tars/{{00..{count - 1:02d}}}.tar"', f"data.image_size={SOURCE_SIDE}", "codec=pixels"),
        *("baselines=[]", "scores.spaces=[pixels]", "partition.num_experts=2", "scores.conditional=false"),
    )
    run_pipeline(parse_config(compose([*settings, f"folder={run}"])), Console(file=io.StringIO()))
    totals: Counter[str] = Counter()
    seen = set()
    for path in run.rglob("*"):
        parts, status = path.relative_to(run).parts, path.stat()
        if path.is_file() and CACHE not in parts and status.st_ino not in seen:
            seen.add(status.st_ino)
            totals[parts[1].rpartition("-")[0] if len(parts) > 2 else "the rest"] += status.st_size
    return dict(totals)


if __name__ == "__main__":
    main()
