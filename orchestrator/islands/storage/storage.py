"""Trees (folders) and small JSON files in a storage that several machines reach: a local folder, S3 or Google's."""

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ddm_core.artifacts import to_jsonable
from orchestrator.islands.storage.errors import CorruptTransfer, StorageError, StorageUnreachable, explain_storage_error
from orchestrator.islands.storage.index import INDEX, Entry, validate_name
from orchestrator.islands.storage.object_store import map_parallel
from orchestrator.islands.storage.open import open_store
from orchestrator.islands.storage.snapshot import Checksums
from orchestrator.islands.storage.tree import TransferStats, Tree

__all__ = ["CorruptTransfer", "TransferStats", "Storage", "StorageError", "StorageUnreachable"]


class Storage:
    """One storage, safe to use from any number of threads; every method raises `StorageError` or a subclass."""

    def __init__(self, url: str, options: Mapping[str, str] = MappingProxyType({})) -> None:
        self.url = url
        self._store = open_store(url, options)
        self._checksums = Checksums()
        self._locks: dict[str, threading.Lock] = {}

    def put_tree(self, folder: Path, name: str, skip: tuple[str, ...] = ()) -> TransferStats:
        """Make the tree equal to the folder, uploading only new content; `skip` has top-level names to leave out.

        Another process may write to the folder as `ddm_core.artifacts` does, by renaming finished files.
        """
        with self._explain_errors("sending", name), self._get_lock(name):
            return self._open_tree(name).put(folder, skip)

    def get_tree(self, name: str, folder: Path) -> TransferStats:
        """Make the folder equal to the tree, all files or none; every file is compared with its checksum."""
        with self._explain_errors("fetching", name), self._get_lock(name):
            return self._open_tree(name).get(folder)

    def sync_tree(self, name: str, folder: Path) -> TransferStats:
        """Download changed files into a folder that is in use, each atomically; an absent tree has no files.

        Files that are not in the tree are not deleted.
        """
        with self._explain_errors("syncing", name), self._get_lock(name):
            return self._open_tree(name).sync(folder)

    def has_tree(self, name: str) -> bool:
        """Return whether a tree was uploaded completely."""
        return self.read_index(name) is not None

    def read_index(self, name: str) -> dict[str, Entry] | None:
        """Return checksum and size of every file of a tree, by path; None if there is no tree."""
        with self._explain_errors("reading", name):
            return self._open_tree(name).read_index()

    def put_json(self, name: str, value: object) -> None:
        """Write a value, replacing any present one."""
        with self._explain_errors("writing", name):
            self._store.write(name, _encode_json(value))

    def get_json(self, name: str) -> Any | None:
        """Read a value; return None if there is none."""
        with self._explain_errors("reading", name):
            data = self._store.read(name)
        try:
            return None if data is None else json.loads(data)
        except (ValueError, RecursionError) as error:
            raise CorruptTransfer(f"{name} in {self.url} is no JSON ({error}); write it again") from error

    def create_json(self, name: str, value: object) -> bool:
        """Write a value if there is none; of several concurrent writers, one gets True.

        After a lost response even that one may get False, so a value should name its writer.
        """
        with self._explain_errors("creating", name):
            return self._store.create(name, _encode_json(value))

    def delete(self, name: str) -> None:
        """Delete a file, or a tree with everything below it, indexes first."""
        with self._explain_errors("deleting", name), self._get_lock(name):
            keys = self._store.list_keys(name)
            indexes = {key for key in keys if key.endswith(f"/{INDEX}")}
            map_parallel(self._store.delete, indexes)
            map_parallel(self._store.delete, set(keys) - indexes)

    def _open_tree(self, name: str) -> Tree:
        return Tree(self._store, self._checksums, name, f"tree {name} in {self.url}")

    def _get_lock(self, name: str) -> threading.Lock:
        """Return the lock of a tree, which serializes this process's threads."""
        return self._locks.setdefault(name, threading.Lock())

    @contextlib.contextmanager
    def _explain_errors(self, verb: str, name: str) -> Iterator[None]:
        validate_name(name)
        store = self._store
        with explain_storage_error(f"{verb} {name} at {self.url}", store.refusal_errors, store.unreachable_errors):
            yield


def _encode_json(value: object) -> bytes:
    return json.dumps(to_jsonable(value), sort_keys=True).encode()
