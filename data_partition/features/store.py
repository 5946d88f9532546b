"""Crash-safe storage of features: a kill loses at most the batch in progress."""

import os
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import Float32

from ddm_core.artifacts import read_json, write_json
from ddm_core.files.links import link_or_copy
from ddm_core.files.memmaps import create_memmap

FEATURES, KEYS, PROGRESS = "features.npy", "keys.txt", "progress.json"


class FeatureFile:
    """A memory-mapped array of `count` rows, the keys of its rows, and the number of rows safely on the disk."""

    def __init__(self, folder: Path, count: int, dimension: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        progress = read_json(folder / PROGRESS) if (folder / PROGRESS).exists() else {"rows": 0, "key_bytes": 0}
        self.rows: int = progress["rows"]
        if self.rows:
            self._features = np.lib.format.open_memmap(folder / FEATURES, mode="r+")
        else:
            self._features = create_memmap(folder / FEATURES, np.float32, (count, dimension))
        self._keys = (folder / KEYS).open("r+b" if self.rows else "w+b")
        self._keys.truncate(progress["key_bytes"])
        self._keys.seek(0, os.SEEK_END)

    def __enter__(self) -> "FeatureFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._keys.close()

    def append(self, keys: list[str], features: Float32[np.ndarray, "batch feature"]) -> None:
        """Write one batch; `rows` grows once everything is on the disk."""
        self._features[self.rows : self.rows + len(keys)] = features
        self._features.flush()
        self._keys.write("".join(f"{key}\n" for key in keys).encode())
        self._keys.flush()
        os.fsync(self._keys.fileno())
        self.rows += len(keys)
        write_json(self.folder / PROGRESS, {"rows": self.rows, "key_bytes": self._keys.tell()})

    def copy_to(self, folder: Path) -> None:
        """Give the finished array and its keys a second name in `folder`, or copy them."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in (FEATURES, KEYS):
            link_or_copy(self.folder / name, folder / name)
