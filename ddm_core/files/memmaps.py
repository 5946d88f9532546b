"""Arrays on the disk that may be larger than the memory."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy.typing import DTypeLike


def open_rows(path: Path) -> Int64[np.ndarray, " row"]:
    """Map a file of 64-bit numbers, which may be empty."""
    return np.memmap(path, np.int64, "r") if path.stat().st_size else np.zeros(0, np.int64)


def create_memmap(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[Any]]:
    """Create a memory-mapped `.npy` file and reserve its disk space at once.

    A full disk raises `OSError` here; without the reservation a later write would kill the process (SIGBUS).
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
