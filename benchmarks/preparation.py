"""Centroids and clusters of very many samples (`make bench-preparation`): time, memory, two workers.

1. Fine centroids of a sample of a million rows of 768 numbers, and the nearest one of every row, against faiss' own
   calls on the same rows and sample: CPU time of one thread, block by block in turns.
2. The most memory of a fresh process that does so for 10^5 to 10^7 rows, with 64 centroids and one iteration, and for
   10^8 rows of 8 numbers. Files are sparse, so the rows are zeros; products of matrices take as long with them.
3. `data.engine=ray` with two processes and with one, in turns: CPU time of one over that of the busier of two.
4. The whole stage `partition` with `data.mode=stream`: time for a sample, memory and bytes at several sizes.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import torch
from ray import cloudpickle  # noqa: TID251 - workers of Ray do not import benchmarks
from threadpoolctl import ThreadpoolController

from benchmarks.record import Claim, Listing, median_and_range, write_result
from data_partition.assignment import store_ids
from data_partition.clustering.kmeans import POINTS_PER_CENTROID, choose_training_rows, fit_fine_centroids
from data_partition.config import DataConfig, PartitionConfig
from data_partition.features.extract import save_extractor
from data_partition.features.pca import PCA
from data_partition.features.pixels import PixelFeatures
from data_partition.features.store import FEATURES, KEYS
from data_partition.partition import make_partition, open_features, start_assignment
from data_partition.shards.index_writer import OffsetIndexWriter
from data_partition.shards.offset_index import ROW, SourceTar
from ddm_core.artifacts import Workspace, to_json
from ddm_core.engine import LocalEngine, row_ranges
from orchestrator.backends.ray_cluster import RayCluster
from orchestrator.backends.ray_data import RayEngine
from orchestrator.config.compute import ComputeConfig, ResourcesConfig

MAX_TIME, MAX_MEMORY_MB, MIN_SPEED = 1.2, 1024.0, 1.7
SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured."""

    rows: int = 1_000_000
    dimension: int = 768
    fine: int = 1024
    iterations: int = 10
    block: int = 65_536
    flat_rows: tuple[int, ...] = (100_000, 1_000_000, 10_000_000)
    flat_fine: int = 64
    narrow_rows: int = 100_000_000
    ray_rows: int = 1_000_000
    turns: int = 2
    stage_rows: tuple[int, ...] = (50_000, 200_000)


TINY = Size(
    rows=3000,
    dimension=16,
    fine=8,
    iterations=3,
    block=1000,
    flat_rows=(1000, 5000),
    flat_fine=4,
    narrow_rows=20_000,
    ray_rows=4000,
    turns=1,
    stage_rows=(300, 600),
)


def main() -> None:
    """Measure, write docs/benchmarks/preparation.json and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="seconds, which shows that it works")
    options = parser.parse_args()
    started, size = time.monotonic(), TINY if options.tiny else Size()
    with tempfile.TemporaryDirectory() as name:
        claims, listings = measure(Path(name), size)
    notes = [
        f"Load of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, which other work shares.",
        "Memory is what belongs to the process alone (RssAnon), beyond that of its imports.",
    ]
    if options.tiny:
        print(to_json([claims, listings]))
    else:
        print(to_json(write_result("preparation", time.monotonic() - started, claims, listings, notes)))


def measure(folder: Path, size: Size) -> tuple[list[Claim], list[Listing]]:
    """Measure everything in an empty folder."""
    torch.set_num_threads(1)
    with ThreadpoolController().limit(limits=1):
        write_features(folder / "real", size.rows, size.dimension, np.random.default_rng(SEED))
        speed, centroids = measure_time(folder / "real", size)
        memory = measure_memory(folder, size)
        workers = measure_workers(folder / "real", centroids, size)
        shutil.rmtree(folder / "real")
    stages = [in_new_process(measure_stage, folder / f"stage_{rows}", rows) for rows in size.stage_rows]
    listing = Listing(
        title="The stage partition, data.mode=stream, rows of 64 numbers, 8 clusters",
        columns=("samples", "CPU µs a sample", "memory, MB", "bytes written a sample"),
        rows=[(f"{rows:,}", *figures) for rows, figures in zip(size.stage_rows, stages, strict=True)],
    )
    return [*speed[0], *memory[0], workers[0]], [speed[1], memory[1], workers[1], listing]


def write_features(folder: Path, rows: int, dimension: int, draws: np.random.Generator | None) -> None:
    """Write features of length one, or a sparse file of zeros."""
    folder.mkdir(parents=True)
    values = np.lib.format.open_memmap(folder / FEATURES, "w+", np.float32, (rows, dimension))
    for start in range(0, rows if draws is not None else 0, 50_000):
        block = draws.standard_normal((min(50_000, rows - start), dimension), dtype=np.float32) if draws else values[:0]
        values[start : start + len(block)] = block / np.linalg.norm(block, axis=1, keepdims=True)


def cpu_time(work: Callable[[], object]) -> float:
    """Return the CPU seconds of a call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def measure_time(folder: Path, size: Size) -> tuple[tuple[list[Claim], Listing], np.ndarray]:
    """Compare with faiss' own calls, and return the centroids."""
    faiss.omp_set_num_threads(1)
    values, started = open_features(folder, size.rows), time.monotonic()
    found: list[np.ndarray] = []
    fit = partial(fit_fine_centroids, values, size.fine, size.iterations, SEED)
    fit_s = cpu_time(lambda: found.append(fit()))
    wall_s = time.monotonic() - started
    bare = faiss.Kmeans(
        size.dimension,
        size.fine,
        niter=size.iterations,
        seed=SEED,
        min_points_per_centroid=1,
        max_points_per_centroid=POINTS_PER_CENTROID,
    )
    sample = choose_training_rows(size.rows, size.fine, SEED)
    bare_fit_s = cpu_time(lambda: bare.train(np.ascontiguousarray(values[sample])))
    assign, pairs, equal = start_assignment(folder, size.rows, found[0]), [], 0
    for start, stop in row_ranges(0, size.rows, size.block):
        ids: list[np.ndarray] = []
        started = time.monotonic()
        ours = cpu_time(lambda rows=(start, stop), ids=ids: ids.extend(assign(rows)))
        wall_s += time.monotonic() - started
        theirs: list[np.ndarray] = []
        search = cpu_time(
            lambda rows=slice(start, stop), theirs=theirs: theirs.append(bare.index.search(values[rows], 1)[1])
        )
        pairs.append((ours, search))
        equal += int((np.concatenate(ids) == theirs[0][:, 0]).sum())
    assign_s, search_s = sum(ours for ours, _ in pairs), sum(search for _, search in pairs)
    ratio = (fit_s + assign_s) / (bare_fit_s + search_s)
    _, spread = median_and_range([ours / search for ours, search in pairs], 2)
    claim = Claim(
        name=f"{size.rows:,} × {size.dimension}, {size.fine} centroids: CPU time over that of faiss' own calls",
        bar=f"≤ {MAX_TIME}",
        value=f"{ratio:.2f}",
        spread=f"blocks of the assignment: {spread}",
        holds=ratio <= MAX_TIME,
    )
    rows = [
        (
            f"centroids of a sample of {len(sample):,}, {size.iterations} iterations",
            f"{fit_s:.1f}",
            f"{bare_fit_s:.1f}",
        ),
        ("nearest centroid of every row", f"{assign_s:.1f}", f"{search_s:.1f}"),
        ("both, wall-clock on busy cores", f"{wall_s:.1f}", ""),
        ("rows with the same centroid", f"{equal / size.rows:.6f}", ""),
    ]
    title = f"CPU seconds for {size.rows:,} × {size.dimension}, one thread"
    return ([claim], Listing(title=title, columns=("", "ours", "faiss"), rows=rows)), found[0]


def in_new_process(function: Callable[..., tuple[str, ...]], *arguments: object) -> tuple[str, ...]:
    """Call a function in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


class PeakMemory:
    """The largest memory of this process in a block, beyond that at its begin."""

    def __init__(self, file: Path | None = None) -> None:
        self.anonymous_mb = self.all_mb = 0.0
        self._file, self._ended = file, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "PeakMemory":
        self._first = _resident_mb()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            anonymous, everything = (now - first for now, first in zip(_resident_mb(), self._first, strict=True))
            self.anonymous_mb, self.all_mb = max(self.anonymous_mb, anonymous), max(self.all_mb, everything)
            if self._file is not None:  # other work on this machine needs its page cache
                descriptor = os.open(self._file, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def _resident_mb() -> tuple[float, float]:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "VmRSS"))  # type: ignore[return-value]


def measure_memory(folder: Path, size: Size) -> tuple[list[Claim], Listing]:
    """Measure how memory grows with the rows."""
    rows, peaks = [], []
    for count, dimension in [*((count, size.dimension) for count in size.flat_rows), (size.narrow_rows, 8)]:
        place = folder / f"sparse_{count}"
        write_features(place, count, dimension, None)
        figures = in_new_process(assign_all, place, count, dimension, size)
        shutil.rmtree(place)
        rows.append((f"{count:,} × {dimension}", *figures))
        peaks.append(float(figures[0]) - float(figures[1]))
    growth = max(peaks) - min(peaks)
    claims = [
        Claim(
            name="memory beyond the sample, the most of all sizes, MB",
            bar=f"≤ {MAX_MEMORY_MB:.0f}",
            value=f"{max(peaks):.0f}",
            spread="",
            holds=max(peaks) <= MAX_MEMORY_MB,
        ),
        Claim(
            name=f"… and how much it differs from {size.flat_rows[0]:,} to {size.narrow_rows:,} rows, MB",
            bar="≤ 100",
            value=f"{growth:.0f}",
            spread="",
            holds=growth <= 100,
        ),
    ]
    columns = ("rows", "memory, MB", "of it the sample", "with mapped files, MB", "CPU s", "CPU µs a row")
    return claims, Listing(title="Memory of a process that fits and assigns", columns=columns, rows=rows)


def assign_all(folder: Path, count: int, dimension: int, size: Size) -> tuple[str, ...]:
    """Fit and assign, and return memory and time."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    sample_mb = min(count, POINTS_PER_CENTROID * size.fine) * dimension * 4 / 2**20
    with ThreadpoolController().limit(limits=1), PeakMemory(folder / FEATURES) as peak:
        started = time.process_time()
        centroids = fit_fine_centroids(open_features(folder, count), size.fine, 1, SEED)[: size.flat_fine].copy()
        blocks = LocalEngine().map(
            partial(start_assignment, folder, count, centroids), row_ranges(0, count, size.block)
        )
        store_ids(folder / "ids.npy", count, blocks)
        seconds = time.process_time() - started
    return (
        f"{peak.anonymous_mb:.0f}",
        f"{sample_mb:.0f}",
        f"{peak.all_mb:.0f}",
        f"{seconds:.1f}",
        f"{seconds / count * 1e6:.1f}",
    )


def start_counting(
    start: Callable[[], Callable[[tuple[int, int]], Iterable[np.ndarray]]],
) -> Callable[[tuple[int, int]], Iterator[tuple[int, float, np.ndarray]]]:
    """Return the function that also yields the process of each block, and its CPU seconds."""
    work = start()

    def counted(rows: tuple[int, int]) -> Iterator[tuple[int, float, np.ndarray]]:
        before = time.process_time()
        for block in work(rows):
            yield os.getpid(), time.process_time() - before, block
            before = time.process_time()

    return counted


def measure_workers(folder: Path, centroids: np.ndarray, size: Size) -> tuple[Claim, Listing]:
    """Compare two processes of Ray Data with one."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    start = partial(start_counting, partial(start_assignment, folder, size.rows, centroids))
    pieces, rows, ratios = row_ranges(0, size.ray_rows, max(1, size.block // 4)), [], []
    cluster = RayCluster(ComputeConfig(cpus=2))
    try:
        for _ in range(size.turns):
            turn: list[tuple[float, float]] = []
            for workers in (1, 2):
                used: dict[int, float] = defaultdict(float)
                started = first = time.monotonic()
                for number, (pid, seconds, _) in enumerate(
                    RayEngine(ResourcesConfig(workers=workers)).map(start, pieces)
                ):
                    used[pid] += seconds
                    first = time.monotonic() if number == 0 else first
                ended = time.monotonic()
                turn.append((max(used.values()), ended - first))
                rows.append(
                    (f"{workers}", f"{max(used.values()):.2f}", f"{ended - first:.1f}", f"{first - started:.1f}")
                )
            ratios.append(turn[0][0] / turn[1][0])
    finally:
        cluster.close()
    value, spread = median_and_range(ratios, 2)
    claim = Claim(
        name="data.engine=ray: CPU time of one process / of the busier of two",
        bar=f"≥ {MIN_SPEED}",
        value=value,
        spread=spread,
        holds=float(value) >= MIN_SPEED,
    )
    columns = ("processes", "CPU s of the busiest", "wall-clock s from the first result", "s to the first result")
    return claim, Listing(title=f"Nearest centroids of {size.ray_rows:,} rows by Ray Data", columns=columns, rows=rows)


def measure_stage(folder: Path, count: int) -> tuple[str, ...]:
    """Return time, memory and bytes of the stage `partition` on an offset index of so many samples."""
    torch.set_num_threads(1)
    write_stage_inputs(folder, count)
    config, before = PartitionConfig(num_experts=8, num_fine=256, iterations=5), time.process_time()
    with ThreadpoolController().limit(limits=1), PeakMemory() as peak:
        make_partition(config, folder / "data", folder / "features", folder / "out", Workspace.at(folder / "work"))
    seconds = time.process_time() - before
    size = sum(path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file())
    shutil.rmtree(folder)
    return f"{seconds / count * 1e6:.0f}", f"{peak.anonymous_mb:.0f}", f"{size / count:.0f}"


def write_stage_inputs(folder: Path, count: int, dimension: int = 64) -> None:
    """Write an offset index and features without images: the stage reads none of the training images."""
    config = DataConfig(source="webdataset", path="/none.tar", mode="stream", image_size=8, labels=False)
    for part, rows in (("train", count), ("holdout", 0)):
        with OffsetIndexWriter(folder / "data" / part, config, (8, 8, 1)) as writer:
            tars = [SourceTar(url=f"/none/{number:05d}.tar", size=1, etag="") for number in range(count // 10_000 + 1)]
            texts = (json.dumps([f"{number:09d}", "", []]).encode() for number in range(rows))
            for number, text in enumerate(texts):
                row = np.zeros(1, ROW)
                row["sample_id"], row["label"] = number, -1
                writer.append(tars[number // 10_000], row, text)
            writer.close()
    features = folder / "features"
    write_features(features, count, dimension, np.random.default_rng(SEED))
    (features / KEYS).write_text("".join(f"{number:09d}\n" for number in range(count)))
    basis = np.eye(dimension, dtype=np.float32)
    pca = PCA(mean=np.zeros(dimension, np.float32), components=basis, variances=np.ones(dimension, np.float32))
    save_extractor("pixels", PixelFeatures(pca), features / "extractor")


if __name__ == "__main__":
    main()
