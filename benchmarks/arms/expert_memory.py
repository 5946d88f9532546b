"""One process of the memory benchmark: sample under a budget of memory, and print peak memory and CPU time.

python -m benchmarks.arms.expert_memory FOLDER MAX_MEMORY|all IMAGES STEPS
"""

import json
import sys
import time
from pathlib import Path

import torch

from ensemble.pipelines.diffusion_pipeline import EnsembleDiffusionPipeline
from experts.types import Latents


def main() -> None:
    """Sample, and print one JSON object."""
    folder, budget, images, steps = sys.argv[1:]
    torch.set_num_threads(1)
    base, started = _memory("RssAnon"), time.process_time()
    pipeline = EnsembleDiffusionPipeline.from_pretrained(folder, max_memory=None if budget == "all" else int(budget))
    pipeline.set_progress_bar_config(disable=True)
    latents: Latents = pipeline(seeds=range(int(images)), num_inference_steps=int(steps), output_type="latent").images
    result = {
        "peak_mb": _memory("VmHWM") - base,
        "cpu_s": time.process_time() - started,
        "loads": 0 if pipeline.pager is None else pipeline.pager.loads,
        "residency": pipeline.residency()[0],
        "latents": latents.flatten(1).double().sum(1).tolist(),
    }
    print(json.dumps(result))


def _memory(field: str) -> float:
    """Return a field of this process' memory in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
