"""The speed of a training: samples and FLOPs per second, time spent waiting for data, and peak memory."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator

import torch

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "L4": 121e12,
    "T4": 65e12,
}
"""Dense FLOPs per second in 16 bits, by a part of the device's name; from the data sheets of their maker."""


class Throughput:
    """Measures a training between two rows of its log; asks the device for nothing but its memory."""

    def __init__(self, device: torch.device, sample_flops: float, workers: int, *, is_16_bit: bool) -> None:
        """Start to measure; `sample_flops` are those of one sample, forward and backward, 0 if they are unknown."""
        self.device, self.sample_flops = device, sample_flops
        name = torch.cuda.get_device_name(device) if device.type == "cuda" and is_16_bit else ""
        self.peak_flops = workers * next((peak for part, peak in PEAK_FLOPS.items() if part in name), 0.0)
        self.started, self.waited = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of a block as waiting for data."""
        started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - started

    def take(self, samples: int) -> dict[str, float]:
        """Return the figures of `samples` since the last call; the device must have finished them."""
        elapsed = time.perf_counter() - self.started
        figures = {
            "samples_per_s": samples / elapsed,
            "data_stall": self.waited / elapsed,
            "peak_memory_gb": peak_memory_bytes(self.device) / 1e9,
        }
        if self.sample_flops:
            figures["flops_per_s"] = self.sample_flops * samples / elapsed
            if self.peak_flops:
                figures["mfu"] = figures["flops_per_s"] / self.peak_flops
        self.started, self.waited = time.perf_counter(), 0.0
        return figures


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory so far: that of torch's tensors on a GPU, elsewhere that of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
