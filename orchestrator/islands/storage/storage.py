"""Folders and small JSON files in a storage that several machines reach: a local folder, S3, Google's storage."""

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ddm_core.artifacts import to_jsonable
from orchestrator.islands.storage.errors import CorruptTransfer, StorageError, StorageUnreachable, explain_storage_error
from orchestrator.islands.storage.index import INDEX, Entry, checked_name
from orchestrator.islands.storage.object_store import map_parallel
from orchestrator.islands.storage.open import open_store
from orchestrator.islands.storage.snapshot import Checksums
from orchestrator.islands.storage.tree import TransferStats, Tree

__all__ = ["CorruptTransfer", "TransferStats", "Storage", "StorageError", "StorageUnreachable"]


class Storage:
    """One place, used from any number of threads; every method raises `StorageError` or one of its kinds."""

    def __init__(self, url: str, options: Mapping[str, str] = MappingProxyType({})) -> None:
        self.url = url
        self._objects = open_store(url, options)
        self._checksums = Checksums()
        self._locks: dict[str, threading.Lock] = {}

    def put_tree(self, folder: Path, name: str, skip: tuple[str, ...] = ()) -> TransferStats:
        """Make the tree equal to the folder, sending only content that is not there; `skip` names what stays out.

        Somebody may be working in the folder as `artifacts.py` does, by renaming what is finished.
        """
        with self._at("sending", name), self._alone(name):
            return self._tree(name).put(folder, skip)

    def get_tree(self, name: str, folder: Path) -> TransferStats:
        """Make the folder equal to the tree, whole or not at all; every file is compared with its checksum."""
        with self._at("fetching", name), self._alone(name):
            return self._tree(name).get(folder)

    def sync_tree(self, name: str, folder: Path) -> TransferStats:
        """Bring what has changed into a folder that is in use, each file whole; an absent tree is no files.

        Files that are not in the tree stay.
        """
        with self._at("following", name), self._alone(name):
            return self._tree(name).sync(folder)

    def has_tree(self, name: str) -> bool:
        """Whether a tree was sent to its end."""
        return self.tree(name) is not None

    def tree(self, name: str) -> dict[str, Entry] | None:
        """Checksum and size of every file of a tree, by path; None if there is no tree."""
        with self._at("reading", name):
            return self._tree(name).index()

    def put_json(self, name: str, value: object) -> None:
        """Write a value over whatever was there."""
        with self._at("writing", name):
            self._objects.write(name, _encoded(value))

    def get_json(self, name: str) -> Any | None:
        """The value that was written; None if there is none."""
        with self._at("reading", name):
            data = self._objects.read(name)
        try:
            return None if data is None else json.loads(data)
        except (ValueError, RecursionError) as error:
            raise CorruptTransfer(f"{name} in {self.url} is no JSON ({error}); write it again") from error

    def create_json(self, name: str, value: object) -> bool:
        """Write a value unless there is one: of several who try, one gets True.

        After a lost answer even that one may get False, so a value should say whose it is.
        """
        with self._at("creating", name):
            return self._objects.create(name, _encoded(value))

    def delete(self, name: str) -> None:
        """Delete a file, or a tree with all that lies below it, indexes first."""
        with self._at("deleting", name), self._alone(name):
            found = self._objects.below(name)
            indexes = {key for key in found if key.endswith(f"/{INDEX}")}
            map_parallel(self._objects.remove, indexes)
            map_parallel(self._objects.remove, set(found) - indexes)

    def _tree(self, name: str) -> Tree:
        return Tree(self._objects, self._checksums, name, f"tree {name} in {self.url}")

    def _alone(self, name: str) -> threading.Lock:
        """Held by the one thread that works on a tree."""
        return self._locks.setdefault(name, threading.Lock())

    @contextlib.contextmanager
    def _at(self, verb: str, name: str) -> Iterator[None]:
        checked_name(name)
        with explain_storage_error(f"{verb} {name} at {self.url}", self._objects.refusals, self._objects.silences):
            yield


def _encoded(value: object) -> bytes:
    return json.dumps(to_jsonable(value), sort_keys=True).encode()
