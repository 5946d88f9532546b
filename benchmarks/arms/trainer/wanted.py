"""What was slow in the trainer, the sampler and the pipeline, as it is now: one table, each row met or not."""

import hashlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import PIL.Image
import torch

from benchmarks.arms.finished_run import FinishedRun
from benchmarks.arms.trainer.cases import CASES, Effort, Measured, make_dataset, make_network
from benchmarks.arms.trainer.sampling import make_ensemble
from benchmarks.record import RESULTS, Claim, Listing
from data_partition.shards.decoded_images import IMAGES
from ddm_core.artifacts import list_files, read_json
from ddm_core.files.checksums import digest_once
from ensemble.routing import called_experts
from experts.conditions.condition import Condition
from experts.config import TrainingConfig
from experts.training.latent_dataset import make_batch
from orchestrator.run import worker
from orchestrator.run.backend import AttemptOutcome, Job
from router.config import SelectionConfig

PICTURES = 2000
SETTINGS = (
    "data=image_folder",
    "data.captions=true",
    "data.labels=false",
    "data.holdout=0.2",
    "text=minilm",
    "text.classes=false",
    "compute.backend=inline",
    "partition.num_experts=4",
    "partition.num_fine=32",
    "partition.features=random_conv",
    "codec.components=32",
    "baselines=[monolith]",
    "expert.training.steps=20",
    "expert.training.batch_size=64",
    "router.training.steps=20",
    "scores.num_samples=32",
    "scores.spaces=[pixels]",
    "ensemble.steps=4",
    "wandb.mode=disabled",
)
"""A short run on captioned pictures in one process, by four experts and a monolith."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A row of the table."""

    where: str
    wanted: str
    before: str
    """When the table was first made."""
    now: str
    is_met: bool


def measure_wanted(effort: Effort) -> Measured:
    """Measure every row; those of steps, of batches of seeds and of the preparation are read from their results."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        rows = [*recorded_rows(), *batch_rows(), one_image_row()]
        rows += [*folder_rows(Path(name) / "pictures", run, 250 if effort.is_tiny else PICTURES), command_row(run)]
    met = sum(row.is_met for row in rows)
    claim = Claim(
        name="wanted: rows of the table of what was slow that are met",
        bar="all",
        value=f"{met} of {len(rows)}",
        spread="",
        holds=met == len(rows),
    )
    cells = [(row.where, row.wanted, row.before, row.now, "yes" if row.is_met else "**no**") for row in rows]
    columns = ("where", "wanted", "before", "now", "met")
    return [claim], [Listing(title="wanted: what was slow, as it is now", columns=columns, rows=cells)]


def recorded_rows() -> Iterator[Wanted]:
    """Yield the rows that other parts and the benchmark of the preparation have measured last."""
    before = {"MLP, small": "1.10", "MLP, default": "1.04", "U-Net": ".98, all of it 1.11 to 1.16", "DiT": "1.03"}
    for claim in read_json(RESULTS / "training.json")["claims"]:
        part, _, about = claim["name"].partition(": ")
        case = about.rpartition(": ")[2]
        if part == "steps" and "plain loop" in about and case in before:
            yield Wanted(
                f"`fit` over an independent loop, {case}", claim["bar"], before[case], claim["value"], claim["holds"]
            )
        if part == "sampling" and "a dense model" in about and "K = 8" in case:
            yield Wanted(
                f"sticky over one dense model, {case}", claim["bar"], "3.9 to 4.1", claim["value"], claim["holds"]
            )
    flat = next(c for c in read_json(RESULTS / "preparation.json")["claims"] if "how much it differs" in c["name"])
    yield Wanted("memory from 10^5 to 10^8 samples, MB more", "flat", "flat", flat["value"], flat["holds"])


def batch_rows() -> Iterator[Wanted]:
    """Yield what drawing a batch of 256 costs, all of it and the rows of one worker of two."""
    config = TrainingConfig(batch_size=256)
    for shape, before in (((4, 32, 32), "13 ms"), ((3, 64, 64), "23 ms")):
        dataset = make_dataset(replace(CASES["DiT"], shape=shape))
        whole, own = make_batch(dataset, config, 3), make_batch(dataset, config, 3, slice(128, 256))
        same = torch.equal(own.noise, whole.noise[128:]) and torch.equal(own.clean, whole.clean[128:])
        all_s = cpu_median(lambda dataset=dataset: make_batch(dataset, config, 3))
        own_s = cpu_median(lambda dataset=dataset: make_batch(dataset, config, 3, slice(128, 256)))
        yield Wanted(
            f"a batch of 256 × {shape}; of one worker of two",
            "own rows only (≤ .75 of the time), same bits",
            before,
            f"{1e3 * all_s:.1f} ms; {own_s / all_s:.2f} of it, bits {'equal' if same else 'differ'}",
            same and own_s <= 0.75 * all_s,
        )


def one_image_row() -> Wanted:
    """Return which experts one image of 64 calls, and what it costs that all are where they should be."""
    case = CASES["MLP, default"]
    ensemble = make_ensemble(lambda: make_network(case), case.shape, 64)
    gates = ensemble.init_routing([0], Condition.null(1), SelectionConfig(name="sticky")).gates
    called = called_experts(gates)
    move_s = cpu_median(lambda: ensemble.to("cpu", called))
    return Wanted(
        "one image of K = 64",
        "only active experts; nothing if they are there (≤ 1 ms)",
        "all 64; 41 ms",
        f"{len(called)}; {1e3 * move_s:.2f} ms",
        len(called) == 1 and move_s <= 1e-3,
    )


def cpu_median(function: Callable[[], object], repeats: int = 15) -> float:
    """Return the median CPU time of a call, after one that warms up."""
    function()
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        function()
        seconds.append(time.process_time() - started)
    return median(seconds)


def write_pictures(folder: Path, count: int) -> int:
    """Write captioned pictures of 32 × 32 of random waves, and return their bytes."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[0:32, 0:32] / 32
    for number in range(count):
        pace, shift = generator.uniform(1, 6, (2, 3)), generator.uniform(0, 6, 3)
        waves = np.sin(rows[..., None] * pace[0] + columns[..., None] * pace[1] + shift)
        noisy = 127 + 90 * waves + generator.normal(0, 12, waves.shape)
        PIL.Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"waves of {'red' if shift[0] < 3 else 'blue'}")
    return sum(path.stat().st_size for path in folder.glob("*.png"))


@dataclass(frozen=True, slots=True)
class FileWork:
    """What a run did with the bytes of files."""

    decodes: int
    hashed_share: float
    """Bytes hashed over the bytes of all files that were hashed."""


def count_file_work(run: Path, settings: Sequence[str], *, forgets: bool) -> FileWork:
    """Run the pipeline in this process and count; with `forgets` each stage starts as in a process of its own."""
    decodes, hashed = list[int](), list[tuple[int, int]]()
    open_picture, digest_file, execute = PIL.Image.open, hashlib.file_digest, worker.execute

    def opening(*arguments: object, **settings: object) -> PIL.Image.Image:
        decodes.append(1)
        return open_picture(*arguments, **settings)  # type: ignore[arg-type]

    def digesting(file: object, name: str) -> object:
        status = os.fstat(file.fileno())  # type: ignore[attr-defined]
        hashed.append((status.st_ino, status.st_size))
        return digest_file(file, name)  # type: ignore[arg-type]

    def executing(job: Job) -> AttemptOutcome:
        if forgets:
            forget_files()
        return execute(job)

    forget_files()
    with (
        patch("PIL.Image.open", opening),
        patch("hashlib.file_digest", digesting),
        patch.object(worker, "execute", executing),
    ):
        FinishedRun.complete(f"wanted, {forgets=}", [*SETTINGS, *settings, f"folder={run}"])
    total, once = (sum(size for _, size in files) for files in (hashed, set(hashed)))
    return FileWork(len(decodes), total / once)


def forget_files() -> None:
    """Forget what this process knows of files, as a new one does."""
    IMAGES.clear()
    digest_once.cache_clear()


def folder_rows(pictures: Path, run: Path, count: int) -> Iterator[Wanted]:
    """Yield how often a run decodes, copies and hashes its pictures."""
    source_bytes, settings = write_pictures(pictures, count), [f"data.path={pictures}"]
    in_one = count_file_work(run.with_name("in_one"), settings, forgets=False)
    by_stage = count_file_work(run, settings, forgets=True)
    files = {path.stat().st_ino: path for path in list_files(run / "artifacts")}
    kept = sum(path.stat().st_size for path in files.values())
    copies = sum(path.read_bytes().count(b"IHDR") for path in files.values() if path.suffix == ".tar")
    weights = [
        path for path in list_files(run / "artifacts") if path.suffix == ".safetensors" and "expert_" in str(path)
    ]
    linked = sum(path.stat().st_nlink > 1 for path in weights)
    where = "2,000 pictures, K = 4, a process for each stage (one for all)"
    yield Wanted(
        f"{where}: decodes of a picture",
        "≤ 2",
        "10.2",
        f"{by_stage.decodes / count:.2f} ({in_one.decodes / count:.2f})",
        by_stage.decodes <= 2 * count,
    )
    yield Wanted("… copies of a picture in artifacts", "≤ 1", "2 and more", *at_most(copies / count, 1))
    yield Wanted(
        "… networks of experts and ensembles that share a file",
        "all",
        "none",
        f"{linked} of {len(weights)}",
        linked == len(weights),
    )
    yield Wanted(
        "… bytes hashed over the bytes of all files that are",
        "≤ 2",
        "not measured",
        f"{by_stage.hashed_share:.2f} ({in_one.hashed_share:.2f})",
        by_stage.hashed_share <= 2,
    )
    yield Wanted("… artifacts over the pictures", "stated", "28", f"{kept / source_bytes:.1f}", is_met=True)


def at_most(value: float, limit: float) -> tuple[str, bool]:
    """Return a value as text, and whether it is at most the limit."""
    return f"{value:.2f}", value <= limit


def command_row(run: Path) -> Wanted:
    """Return the CPU time of `ddm sample` for one image of a prompt, beside that of its libraries alone."""
    words = ["-m", "orchestrator", "sample", str(run), "--prompt", "waves of red", "--seeds", "0"]
    ours = child_cpu_median([*words, "--out", str(run / "one.png")])
    torch_s = child_cpu_median(["-c", "import torch"])
    diffusers_s = child_cpu_median(["-c", "import torch, diffusers.models.modeling_utils"])
    return Wanted(
        "`ddm sample`, one image of a prompt, CPU s (torch; torch and diffusers)",
        "≤ 3",
        "7.5 (1.6; 5.5)",
        f"{ours:.1f} ({torch_s:.1f}; {diffusers_s:.1f})",
        ours <= 3,
    )


def child_cpu_median(arguments: list[str], repeats: int = 3) -> float:
    """Return the median CPU time of a Python process, after one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return median(seconds[1:])
