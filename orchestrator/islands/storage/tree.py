"""One folder in a storage: sent, fetched, followed.

    <name>/<sha256>      content of a file, under the name of its checksum
    <name>/.tree.json    the index: path, checksum and size of every file; written last

Nothing that an index names is ever overwritten, so a put that is killed leaves the tree as it was, and a reader
sees the tree before or after, never between. One writer at a time a tree; readers, any number.
"""

import contextlib
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ddm_core.artifacts import atomic_folder, sync
from orchestrator.islands.storage.errors import CorruptTransfer, StorageError
from orchestrator.islands.storage.index import INDEX, Entry, Index, parse, render
from orchestrator.islands.storage.object_store import ObjectStore, map_parallel
from orchestrator.islands.storage.snapshot import TRIES, Checksums, files_of, snapshot

CONTENT = re.compile(r"[0-9a-f]{64}$|\..+\.part$")
"""What may be deleted from a tree's own folder: contents, and what a killed process has left half-written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferStats:
    """What has really crossed; nothing if it was there already."""

    files: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Tree:
    """A folder in a storage."""

    objects: ObjectStore
    checksums: Checksums
    """Of local files."""
    name: str
    where: str
    """The tree for people: its name and its storage."""

    def index(self) -> Index | None:
        """What the tree consists of; None if there is no tree."""
        data = self.objects.read(self._key(INDEX))
        return None if data is None else parse(data, f"the index of {self.where}")

    def put(self, folder: Path, skip: tuple[str, ...]) -> TransferStats:
        """Make the tree equal to a folder."""
        there = self.objects.sizes(self.name)
        before = self._readable_index()
        index, sent = self._send(folder, skip, there)
        if index != before:
            self.objects.write(self._key(INDEX), render(index))
        kept = {entry.sha256 for entry in index.values()}
        map_parallel(self.objects.remove, [self._key(key) for key in there if CONTENT.match(key) and key not in kept])
        return TransferStats(files=len(sent), bytes=sum(sent.values()))

    def get(self, folder: Path) -> TransferStats:
        """Make a folder equal to the tree, whole or not at all."""
        index = self.index()
        if index is not None and self._is_in(folder, index):
            return TransferStats(files=0, bytes=0)
        with atomic_folder(folder) as temporary:
            index, moved = self._download(index, temporary)
            if index is None:
                raise StorageError(f"there is no {self.where}; whoever should send it has not finished")
            for path in files_of(temporary).keys() - index.keys():
                (temporary / path).unlink()
        return moved

    def sync(self, folder: Path) -> TransferStats:
        """Bring what has changed into a folder that is in use."""
        return self._download(self.index(), folder)[1]

    def _send(self, folder: Path, skip: tuple[str, ...], there: Mapping[str, int]) -> tuple[Index, dict[str, int]]:
        """Send what is not there, and say what the folder consists of and what was sent."""

        def send(entry: Entry) -> bool:
            return self.objects.send(self._key(entry.sha256), taken.opened[entry], entry)

        sent: dict[str, int] = {}
        changes = 0
        while changes < TRIES:
            with snapshot(folder, skip, self.checksums, {**there, **sent}) as taken:
                arrived = map_parallel(send, taken.opened)
            sent.update(entry for entry, ok in zip(taken.opened, arrived, strict=True) if ok)
            if taken.whole and all(arrived):
                return taken.index, sent
            changes += not all(arrived)
        raise StorageError(f"files in {folder} have changed {TRIES} times while they were sent; send them later")

    def _download(self, index: Index | None, folder: Path) -> tuple[Index | None, TransferStats]:
        """Bring what differs into a folder; a tree that is replaced meanwhile is read again."""
        landed: list[Entry] = []
        before: tuple[Index | None, dict[str, str]] = None, {}
        for _ in range(TRIES):
            wanted = {path: entry for path, entry in (index or {}).items() if self.checksums.of(folder / path) != entry}
            found = map_parallel(lambda item: self._fetch(folder / item[0], item[1]), wanted.items())
            faults = {path: fault for path, fault in zip(wanted, found, strict=True) if fault}
            landed += (entry for path, entry in wanted.items() if path not in faults)
            if not faults:
                return index, TransferStats(files=len(landed), bytes=sum(entry.bytes for entry in landed))
            if (index, faults) == before:
                self._delete_corrupt(wanted, faults)
            before, index = (index, faults), self.index()
        raise StorageError(f"{self.where} was replaced {TRIES} times while it was fetched; try again")

    def _fetch(self, target: Path, entry: Entry) -> str:
        """Bring one file, and say what is wrong with it; empty if nothing is."""
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{uuid.uuid4().hex[:8]}.{os.getpid()}")
        try:
            self.objects.fetch(self._key(entry.sha256), temporary)
            if self.checksums.of(temporary) != entry:
                return "changed"
            sync(temporary)
            temporary.replace(target)
        except FileNotFoundError:
            return "missing"
        finally:
            temporary.unlink(missing_ok=True)
        return ""

    def _delete_corrupt(self, wanted: Index, faults: Mapping[str, str]) -> None:
        """Delete content that is not what its name says, so that the next put sends it again, and raise."""
        for path, fault in faults.items():
            if fault == "changed":
                with contextlib.suppress(OSError, *self.objects.refusals, *self.objects.silences):
                    self.objects.remove(self._key(wanted[path].sha256))
        named = ", ".join(f"{path} ({fault})" for path, fault in sorted(faults.items())[:5])
        raise CorruptTransfer(
            f"{self.where}: {len(faults)} file(s) are not what was sent: {named}; send the folder again, which sends "
            "these files only"
        )

    def _readable_index(self) -> Index | None:
        """The index; None also if it is broken, since it will be replaced."""
        data = self.objects.read(self._key(INDEX))
        try:
            return None if data is None else parse(data, "")
        except StorageError:
            return None

    def _is_in(self, folder: Path, index: Index) -> bool:
        """Whether a folder is what an index says."""
        same_names = folder.is_dir() and files_of(folder).keys() == index.keys()
        return same_names and all(self.checksums.of(folder / path) == entry for path, entry in index.items())

    def _key(self, part: str) -> str:
        return f"{self.name}/{part}"
