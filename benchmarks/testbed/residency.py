"""Sample with some experts of a model in memory, and print peak memory, the size of one expert, and images a second."""

import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from benchmarks.testbed.served import PROMPTS, anonymous_mb, build_model
from ensemble.config import SamplingConfig
from ensemble.pipelines.paging import weight_bytes
from orchestrator.serving.backend import open_models
from orchestrator.serving.config import Batching, Limits
from orchestrator.serving.model import ServedModel
from orchestrator.serving.request import ImageRequest, check_request
from orchestrator.serving.sources import ModelSource

ROUNDS = 3


def main() -> None:
    """Sample a tiny model first, so that imports are in memory before the measurement."""
    torch.set_num_threads(1)
    folder, resident = Path(sys.argv[1]), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as name:
        build_model(Path(name), 2, 8)
        sample(open_model(Path(name) / "pipeline", 1))
    before, peak, is_over = anonymous_mb("self"), [0.0], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.002):
            peak[0] = max(peak[0], anonymous_mb("self"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = open_model(folder, resident)
    rates = [sample(model) for _ in range(ROUNDS)]
    is_over.set()
    watcher.join()
    print(peak[0] - before, weight_bytes(folder / "expert_0") / 2**20, max(rates))


def open_model(folder: Path, resident: int) -> ServedModel:
    """Open a model with so many experts in memory at a time."""
    source = ModelSource(name="model", folder=folder, sampling=SamplingConfig(steps=10))
    return open_models([source], Batching(resident=resident))["model"]


def sample(model: ServedModel) -> float:
    """Sample 32 images in batches of one expert; return images a second."""
    body = ImageRequest(prompt=PROMPTS[0], n=32, seeds=list(range(32)))
    planned = sorted(model.plan(check_request(body, model.facts, Limits(images=32))), key=lambda each: each[0].expert)
    keys = list(dict.fromkeys(key for key, _ in planned))
    start_s = time.monotonic()
    for key in keys:
        model.denoise(key, [job for other, job in planned if other == key])
    return len(planned) / (time.monotonic() - start_s)


if __name__ == "__main__":
    main()
