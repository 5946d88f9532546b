"""One folder in a storage: upload, download, sync.

    <name>/<sha256>      content of a file, named by its checksum
    <name>/.tree.json    the index: path, checksum and size of every file; written last

Content that an index lists is never overwritten. So a killed upload leaves the tree unchanged, and a reader gets the
tree before or after an upload, never a mixture. A tree has one writer at a time and any number of readers.
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
from orchestrator.islands.storage.index import INDEX, Entry, Index, parse_index, render_index
from orchestrator.islands.storage.object_store import ObjectStore, map_parallel
from orchestrator.islands.storage.snapshot import TRIES, Checksums, list_files, snapshot

DELETABLE = re.compile(r"[0-9a-f]{64}$|\..+\.part$")
"""Names that may be deleted from a tree's own folder: contents, and partial files of killed processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferStats:
    """Number of files and bytes that were transferred; content that was present already does not count."""

    files: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Tree:
    """A folder in a storage."""

    store: ObjectStore
    checksums: Checksums
    """Of local files."""
    name: str
    description: str
    """The tree's name and its storage, for messages."""

    def read_index(self) -> Index | None:
        """Return the tree's index; None if there is no tree."""
        data = self.store.read(self._key(INDEX))
        return None if data is None else parse_index(data, f"the index of {self.description}")

    def put(self, folder: Path, skip: tuple[str, ...]) -> TransferStats:
        """Make the tree equal to a folder."""
        remote_sizes = self.store.list_sizes(self.name)
        previous = self._read_intact_index()
        index, uploaded = self._upload(folder, skip, remote_sizes)
        if index != previous:
            self.store.write(self._key(INDEX), render_index(index))
        needed = {entry.sha256 for entry in index.values()}
        unused = [self._key(key) for key in remote_sizes if DELETABLE.match(key) and key not in needed]
        map_parallel(self.store.delete, unused)
        return TransferStats(files=len(uploaded), bytes=sum(uploaded.values()))

    def get(self, folder: Path) -> TransferStats:
        """Make a folder equal to the tree, all files or none."""
        index = self.read_index()
        if index is not None and self._matches(folder, index):
            return TransferStats(files=0, bytes=0)
        with atomic_folder(folder) as temporary:
            index, stats = self._download(index, temporary)
            if index is None:
                raise StorageError(f"there is no {self.description}; its upload has not finished, so fetch it later")
            for path in list_files(temporary).keys() - index.keys():
                (temporary / path).unlink()
        return stats

    def sync(self, folder: Path) -> TransferStats:
        """Download changed files into a folder that is in use."""
        return self._download(self.read_index(), folder)[1]

    def _upload(
        self, folder: Path, skip: tuple[str, ...], remote_sizes: Mapping[str, int]
    ) -> tuple[Index, dict[str, int]]:
        """Upload new content; return the folder's index and the bytes of each uploaded content by checksum."""

        def upload(entry: Entry) -> bool:
            return self.store.upload(self._key(entry.sha256), taken.open_files[entry], entry)

        uploaded: dict[str, int] = {}
        changes = 0
        while changes < TRIES:
            with snapshot(folder, skip, self.checksums, {**remote_sizes, **uploaded}) as taken:
                succeeded = map_parallel(upload, taken.open_files)
            uploaded.update(entry for entry, ok in zip(taken.open_files, succeeded, strict=True) if ok)
            if taken.is_complete and all(succeeded):
                return taken.index, uploaded
            changes += not all(succeeded)
        raise StorageError(f"files in {folder} have changed {TRIES} times while they were sent; send them later")

    def _download(self, index: Index | None, folder: Path) -> tuple[Index | None, TransferStats]:
        """Download files that differ; start again with the new index if the tree is replaced meanwhile."""
        downloaded: list[Entry] = []
        previous: tuple[Index | None, dict[str, str]] = None, {}
        for _ in range(TRIES):
            wanted = {
                path: entry for path, entry in (index or {}).items() if self.checksums.get(folder / path) != entry
            }
            results = map_parallel(lambda item: self._download_file(folder / item[0], item[1]), wanted.items())
            faults = {path: fault for path, fault in zip(wanted, results, strict=True) if fault}
            downloaded += (entry for path, entry in wanted.items() if path not in faults)
            if not faults:
                return index, TransferStats(files=len(downloaded), bytes=sum(entry.bytes for entry in downloaded))
            if (index, faults) == previous:
                self._delete_corrupt(wanted, faults)
            previous, index = (index, faults), self.read_index()
        raise StorageError(f"{self.description} was replaced {TRIES} times while it was fetched; try again")

    def _download_file(self, target: Path, entry: Entry) -> str:
        """Download one file; return "changed" or "missing" if its content is wrong or absent, else an empty string."""
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{uuid.uuid4().hex[:8]}.{os.getpid()}")
        try:
            self.store.download(self._key(entry.sha256), temporary)
            if self.checksums.get(temporary) != entry:
                return "changed"
            sync(temporary)
            temporary.replace(target)
        except FileNotFoundError:
            return "missing"
        finally:
            temporary.unlink(missing_ok=True)
        return ""

    def _delete_corrupt(self, wanted: Index, faults: Mapping[str, str]) -> None:
        """Delete content that does not match its name, so that the next put uploads it again, and raise."""
        for path, fault in faults.items():
            if fault == "changed":
                with contextlib.suppress(OSError, *self.store.refusal_errors, *self.store.unreachable_errors):
                    self.store.delete(self._key(wanted[path].sha256))
        examples = ", ".join(f"{path} ({fault})" for path, fault in sorted(faults.items())[:5])
        raise CorruptTransfer(
            f"{self.description}: {len(faults)} file(s) differ from what was sent: {examples}; send the folder again, "
            "which uploads only these files"
        )

    def _read_intact_index(self) -> Index | None:
        """Return the index; None also if it is corrupt, since `put` replaces it."""
        data = self.store.read(self._key(INDEX))
        try:
            return None if data is None else parse_index(data, "")
        except StorageError:
            return None

    def _matches(self, folder: Path, index: Index) -> bool:
        """Return whether a folder has exactly the files of an index."""
        has_same_names = folder.is_dir() and list_files(folder).keys() == index.keys()
        return has_same_names and all(self.checksums.get(folder / path) == entry for path, entry in index.items())

    def _key(self, part: str) -> str:
        return f"{self.name}/{part}"
