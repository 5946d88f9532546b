"""Artifacts: folders that are complete or absent, and the workspace of a running stage.

A stage fills a temporary folder; `publish` moves it to its final name and writes `manifest.json` last.
A folder without a manifest is unfinished, whatever else it contains. `Workspace` holds what a stage keeps between two
attempts, and reports its progress.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import ConfigDict, FiniteFloat, TypeAdapter, ValidationError

from ddm_core.engine import Engine, LocalEngine
from ddm_core.errors import DDMError
from ddm_core.files.checksums import checksum

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

STRICT = ConfigDict(extra="forbid")
"""For every configuration dataclass: an unknown key is an error, never ignored."""

UNHASHED_IF_DEFAULT = {"unhashed_if_default": True}
"""Metadata of a configuration field that was added later: a fingerprint omits it while it has its default, so that
artifacts from before its addition keep their fingerprints."""

UNHASHED = {"unhashed": True}
"""Metadata of a configuration field that changes no byte of an artifact; a fingerprint always omits it."""

MANIFEST = "manifest.json"

MAX_SMALL_BYTES = 64 * 2**20
"""Size that no JSON file, configuration or journal of a run reaches."""

CHECKSUM_KEY = "sha256_of_the_rest"
"""The key under which a JSON file carries its own checksum."""

CACHE = "cache"
"""Name of the folder in a scratch folder for files that are quick to recompute; it never leaves its machine."""


class ArtifactError(DDMError):
    """A folder is not the expected artifact."""


class UnfinishedArtifact(ArtifactError):
    """A folder has no manifest: its stage was interrupted or never ran."""


class CorruptArtifact(ArtifactError):
    """A file differs from the checksum in its manifest, or cannot be parsed."""


class Preempted(Exception):  # noqa: N818 - not an error: the work is saved and can continue
    """The stage stopped on request, has saved its work and can be continued."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The origin of an artifact and the checksums of its files."""

    __pydantic_config__ = STRICT

    stage: str
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, str]
    """Fingerprint of every input, by its role."""
    checksums: dict[str, str]
    """SHA-256 of every file, by its path inside the folder."""
    flops: FiniteFloat = 0.0
    """Counted floating point operations of the stage, without the repeated work of earlier attempts."""
    commit: str = ""
    seconds: FiniteFloat = 0.0
    island: str = ""
    attempt: int = 1


def to_jsonable(value: object) -> Any:
    """Convert `value` to JSON types: dataclasses become objects, paths become strings, tuples become lists.

    `pydantic_core.to_jsonable_python` would turn an integer in a float field into a float and so change fingerprints.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return to_jsonable(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def fingerprint(stage: str, config: object, inputs: Mapping[str, str]) -> str:
    """Return the SHA-256 of a stage's name, its configuration and its inputs' fingerprints, as 64 hex digits."""
    text = json.dumps([stage, _identity(config), dict(inputs)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _identity(value: object) -> Any:
    """Convert `value` to JSON types, without fields marked `UNHASHED`, or `UNHASHED_IF_DEFAULT` with their default."""
    if is_dataclass(value) and not isinstance(value, type):
        members = [(member, getattr(value, member.name)) for member in fields(value)]
        return {
            member.name: _identity(content)
            for member, content in members
            if not member.metadata.get("unhashed")
            and not (member.metadata.get("unhashed_if_default") and content == member.default)
        }
    if isinstance(value, Mapping):
        return {str(key): _identity(item) for key, item in value.items()}
    return [_identity(item) for item in value] if isinstance(value, list | tuple) else to_jsonable(value)


def list_files(folder: Path) -> list[Path]:
    """Return every file below `folder` except its manifest, in a fixed order; raises `CorruptArtifact` for a link."""
    paths = sorted(folder.rglob("*"))
    if links := [path for path in paths if path.is_symlink()]:
        raise CorruptArtifact(f"{links[0]} is a link, which may point anywhere; replace it with the file it points to")
    return [path for path in paths if path.is_file() and path.relative_to(folder) != Path(MANIFEST)]


def sync(path: Path) -> None:
    """Flush one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def to_json(value: object) -> str:
    """Serialize `value` as JSON; the same content gives the same text."""
    return json.dumps(to_jsonable(value), indent=1, sort_keys=True) + "\n"


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON, atomically."""
    write_text(path, to_json(value))


def read_json(path: Path) -> Any:
    """Read a JSON file; raises `UnfinishedArtifact` if it is missing, `CorruptArtifact` if it does not parse."""
    return _read_json_and_bytes(path)[0]


def read_small_file(path: Path) -> bytes:
    """Read a regular file; raises `CorruptArtifact` for anything else and for more than `MAX_SMALL_BYTES`.

    A pipe would block the reader, and a huge file would fill the memory.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_SMALL_BYTES:
        raise CorruptArtifact(f"{path} is no regular file of at most {MAX_SMALL_BYTES:,} bytes; delete it")
    return path.read_bytes()


def _read_json_and_bytes(path: Path) -> tuple[Any, bytes]:
    """Return the content of a JSON file and its exact bytes."""
    try:
        data = read_small_file(path)
        return json.loads(data.decode()), data
    except FileNotFoundError:
        raise UnfinishedArtifact(f"{path} does not exist; run the stage that writes it") from None
    except (ValueError, RecursionError) as error:
        raise CorruptArtifact(f"{path} is not valid JSON ({error}); delete its folder and run again") from error


def with_checksum(value: object) -> str:
    """Serialize a JSON object with its own checksum added."""
    content = to_jsonable(value)
    return to_json(content | {CHECKSUM_KEY: hashlib.sha256(to_json(content).encode()).hexdigest()})


def write_record(path: Path, value: object) -> None:
    """Write a dataclass or a dictionary as a JSON object with its own checksum, atomically."""
    write_text(path, with_checksum(value))


def read_with_checksum(path: Path) -> dict[str, Any]:
    """Read what `with_checksum` wrote; raises like `read_json`, and `CorruptArtifact` for a single changed bit."""
    content, data = _read_json_and_bytes(path)
    digest = content.pop(CHECKSUM_KEY, None) if isinstance(content, dict) else None
    before, found, after = data.partition(f'\n "{CHECKSUM_KEY}": "{digest}"'.encode())
    rest = before + after[1:] if after.startswith(b",") else before.removesuffix(b",") + after
    if not found or hashlib.sha256(rest).hexdigest() != digest:
        raise CorruptArtifact(f"{path} does not match its own checksum; delete its folder and run again")
    return dict(content)


def save_arrays(path: Path, arrays: "Mapping[str, NDArray[Any]]") -> None:
    """Write arrays as safetensors.

    Each array is made contiguous first: `safetensors.numpy` writes raw memory, and a transposed or strided array would
    load as another one. numpy is imported here, because `ddm status` works without it.
    """
    import numpy as np
    from safetensors.numpy import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    path.chmod(mode)  # that of every other file; safetensors leaves one that only its owner can read


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that is renamed to `folder` when the block ends without an error.

    Everything is fsynced before the rename, so a crash leaves the old folder, none or the new one, never a partial one.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in list_files(temporary):
            sync(path)
        sync(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(
    folder: Path,
    fill: Callable[[Path], float],
    *,
    stage: str,
    config: object,
    inputs: Mapping[str, str],
    island: str = "",
    attempt: int = 1,
    commit: str = "",
    may_commit: Callable[[], bool] = lambda: True,
) -> Manifest:
    """Let `fill` write an artifact into a temporary folder and return its FLOPs; then rename the folder to `folder`.

    `may_commit` is called last: a worker that has lost its lease must not write, and gets `Preempted`.
    A finished artifact is never replaced.
    """
    if is_finished(folder):
        return read_manifest(folder)
    started = time.monotonic()
    with atomic_folder(folder) as temporary:
        flops = fill(temporary)
        checksums = {str(path.relative_to(temporary)): checksum(path) for path in list_files(temporary)}
        if not may_commit() or is_finished(folder):
            raise Preempted(f"attempt {attempt} of {stage} lost its lease; a later attempt owns {folder.name}")
    manifest = Manifest(
        stage=stage,
        fingerprint=fingerprint(stage, config, inputs),
        config=to_jsonable(config),
        inputs=dict(inputs),
        checksums=checksums,
        flops=flops,
        commit=commit,
        seconds=round(time.monotonic() - started, 3),
        island=island,
        attempt=attempt,
    )
    write_record(folder / MANIFEST, manifest)
    return manifest


def is_finished(folder: Path) -> bool:
    """Return whether `folder` has a manifest, which is written last."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a finished artifact; raises `UnfinishedArtifact` or `CorruptArtifact`."""
    content = read_with_checksum(folder / MANIFEST)
    try:
        return _manifests().validate_python(content)
    except ValidationError as error:
        raise CorruptArtifact(f"{folder / MANIFEST} was written by another version: {error}") from error


@functools.cache
def _manifests() -> TypeAdapter[Manifest]:
    """Build the validator of manifests once."""
    return TypeAdapter(Manifest)


def verify(folder: Path, part: str = "") -> None:
    """Compare the files of an artifact, or of its folder `part`, with their checksums.

    Raises `CorruptArtifact`, which names the files that differ.
    """
    digests = {name: hex for name, hex in read_manifest(folder).checksums.items() if Path(name).is_relative_to(part)}
    broken = [name for name in digests if not (folder / name).is_file() or checksum(folder / name) != digests[name]]
    if broken or not digests:
        raise CorruptArtifact(
            f"{folder / part}: {len(broken)} of {len(digests)} files are missing or changed: {', '.join(broken[:5])}; "
            f"delete {folder} and run again"
        )


@dataclass(frozen=True, slots=True)
class Workspace:
    """The folders of a running stage: scratch files kept between attempts, and the files of this attempt."""

    scratch: Path
    """Kept between attempts: checkpoints, finished batches. Deleting it costs time, never correctness."""
    attempt: Path
    """Files of this attempt alone: `progress.json`, `metrics.jsonl`, `log.txt`."""
    stop_files: tuple[Path, ...] = ()
    """The stage saves its work and raises `Preempted` once one of these files exists."""
    stopping: Callable[[], bool] = lambda: False
    """The stage does the same once this returns True, after a SIGTERM."""
    notices: list[str] = field(default_factory=list)
    """What the person who started the run should know, by `notify`."""
    engine: Engine = field(default_factory=LocalEngine)
    """Where pieces of the work are computed."""
    _clock: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def at(cls, folder: Path) -> Self:
        """Create a workspace for work outside a pipeline, in tests or by hand."""
        (folder / "attempt_1").mkdir(parents=True, exist_ok=True)
        return cls(folder, folder / "attempt_1", (folder / "stop",))

    def part(self, name: str) -> Self:
        """Return a workspace with a scratch folder of its own, for one of several pieces of work."""
        scratch = self.scratch / name
        scratch.mkdir(parents=True, exist_ok=True)
        part: Self = replace(self, scratch=scratch)
        return part

    def notify(self, text: str) -> None:
        """Show a sentence on the terminal of the run, and in this attempt's log."""
        log.warning("%s", text)
        self.notices.append(text)

    def report_progress(
        self, done: int, total: int | None, figures: Mapping[str, float] | None = None, *, unit: str = ""
    ) -> None:
        """Write `progress.json`; `total` None is unknown, and a new `unit` starts a new measurement of pace.

        It writes at most twice a second, so it may be called at every step.
        """
        now = time.monotonic()
        if done != total and now - self._clock.get("reported", 0.0) < 0.5:
            return
        self._clock["reported"] = now
        if self._clock.get("unit") != unit:
            self._clock.update(unit=unit, first=now, first_done=done)
        pace = (done - self._clock["first_done"]) / (now - self._clock["first"] or 1.0)
        left_s = (total - done) / pace if total is not None and pace > 0 else None
        progress = {"done": done, "total": total, "unit": unit, "left_s": left_s, "pace": pace, "time": time.time()}
        write_record(self.attempt / "progress.json", progress | {"figures": dict(figures or {})})

    def stop_requested(self) -> bool:
        """Return whether the work should be saved now; checks the disk at most five times a second."""
        if self.stopping():
            return True
        now = time.monotonic()
        if now - self._clock.get("checked", 0.0) < 0.2:
            return False
        self._clock["checked"] = now
        return any(path.exists() for path in self.stop_files)
