"""Turn a valid run folder into that of a hostile stranger: links, pipes, devices, forged records, foreign values.

A stranger can compute checksums, so every changed file of an artifact, record and configuration is sealed again: what
a command meets is well-formed and false.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ddm_core.artifacts import CHECKSUM_KEY, MANIFEST, ArtifactError, read_manifest, with_checksum
from ddm_core.files.checksums import checksum
from orchestrator.run.lease import process_start_time
from orchestrator.run.run_folder import CONFIG_SEAL

VALUES: Sequence[Any] = (
    None,
    True,
    -1,
    0,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x" * 100_000,
    "../../canary/file",
    "[/red]markup[bold",
    "\x1b[31mred\x07",
    "two\nlines\r",
    "half \ud83d",
    [],
    {},
    [[]] * 9,
)
NAMES = ("\x1b[31mred.json", "two\nlines.json", "[bold]x[/red].tar", "x" * 255, "٣.json", "attempt_²", "-rf", ".hidden")
PICKLE = b"cos\nmkdir\n(V%s\ntR."
"""A pickle that makes a folder when it is loaded."""

LARGEST_CHANGED = 2**20

SPARSE_BYTES = 80 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a hostile folder aims at."""

    canary: Path
    """A folder that no command may change, with the file `file` and the folder `folder`."""
    process: int
    """A process that no command may touch."""


def make_hostile(root: Path, around: Surroundings, draws: random.Random, *, pipeline: bool = False) -> list[str]:
    """Change a run folder, or a pipeline folder, in one to three hostile ways and return their names."""
    ways = list(PIPELINE_WAYS if pipeline else PIPELINE_WAYS + RUN_WAYS)
    done = []
    for _ in range(draws.randint(1, 3)):
        way = draws.choice(ways)
        files = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink()]
        if files:
            with contextlib.suppress(OSError):  # an earlier way has taken away what this one needs
                done.append(f"{way.__name__.strip('_')} {way(root, draws.choice(files), around, draws)}")
    return done


def _link_file(root: Path, file: Path, around: Surroundings, draws: random.Random) -> str:
    target = draws.choice(
        [
            str(around.canary / "file"),
            "/dev/zero",
            "/etc/passwd",
            file.name,
            str(around.canary / "new"),
            "/proc/self/mem",
        ]
    )
    return _replace(file, lambda: file.symlink_to(target), f"{file.relative_to(root)} -> {target}")


def _link_folder(root: Path, file: Path, around: Surroundings, draws: random.Random) -> str:
    folder = draws.choice([path for path in file.parents if path.is_relative_to(root) and path != root] or [file])
    target = draws.choice([around.canary / "folder", around.canary, folder, Path("/dev"), Path("/proc/self")])
    return _replace(folder, lambda: folder.symlink_to(target), f"{folder.relative_to(root)} -> {target}")


def _hard_link(root: Path, file: Path, around: Surroundings, draws: random.Random) -> str:
    return _replace(file, lambda: file.hardlink_to(around.canary / "file"), str(file.relative_to(root)))


def _special(root: Path, file: Path, around: Surroundings, draws: random.Random) -> str:
    kind = draws.choice(["pipe", "folder", "socket", "zero", "full"])
    makers: dict[str, Callable[[], object]] = {
        "pipe": lambda: os.mkfifo(file),
        "folder": lambda: (file / "deep" / "er").mkdir(parents=True),
        "socket": lambda: _make_socket(file),
        "zero": lambda: _make_device(file, 5),
        "full": lambda: _make_device(file, 7),
    }
    return _replace(file, makers[kind], f"{file.relative_to(root)} is a {kind}")


def _huge(root: Path, file: Path, around: Surroundings, draws: random.Random) -> str:
    def make() -> None:
        with file.open("wb") as sparse:
            sparse.truncate(SPARSE_BYTES)

    return _replace(file, make, f"{file.relative_to(root)} has 80 MiB of zeros")


def _foreign_content(root: Path, file: Path, around: Surroundings, draws: random.Random) -> str:
    contents = {
        "a pickle": PICKLE % str(around.canary / "new").encode(),
        "a header of 2^40 bytes": struct.pack("<Q", 2**40) + b"{}",
        "a header with a huge shape": _safetensors({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}),
        "an npy of objects": b"\x93NUMPY\x01\x00" + _npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"),
        "a huge npy": b"\x93NUMPY\x01\x00" + _npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**45},), }}"),
        "deep nesting": b"[" * 200_000,
        "other JSON": json.dumps(draws.choice(VALUES)).encode(),
        "nothing": b"",
        "no text": bytes(draws.randrange(256) for _ in range(64)),
    }
    name = draws.choice(list(contents))
    _put(file, contents[name])
    seal(root, file)
    return f"{file.relative_to(root)} is {name}"


def _value(root: Path, file: Path, around: Surroundings, draws: random.Random) -> str:
    """Change one value of a JSON file, at any depth."""
    files = [path for path in sorted(root.rglob("*.json")) if path.is_file() and path.stat().st_size < LARGEST_CHANGED]
    file = draws.choice(files or [file])
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError, OSError):
        return "nothing"
    path, place = "", content
    while isinstance(place, dict | list) and place:
        key = draws.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
        path += f".{key}"
        if not isinstance(place[key], dict | list) or not place[key] or draws.random() < 0.3:
            if draws.random() < 0.2:
                place.pop(key)
            else:
                place[key] = draws.choice(VALUES)
            break
        place = place[key]
    if isinstance(content, dict) and CHECKSUM_KEY in content:
        content.pop(CHECKSUM_KEY)
        _put(file, with_checksum(content).encode(errors="replace"))
    else:
        _put(file, json.dumps(content).encode())
    seal(root, file)
    return f"{file.relative_to(root)}{path}"


def _entry(root: Path, file: Path, around: Surroundings, draws: random.Random) -> str:
    """Add a file, a folder or a link with a hostile name."""
    entry = file.parent / draws.choice([*NAMES, ".expert_0-0123456789ab.99", "9.json", "step-00000009", "attempt_9"])
    if not os.path.lexists(entry):
        makers: list[Callable[[], object]] = [entry.mkdir, entry.touch, lambda: os.mkfifo(entry)]
        makers.append(lambda: entry.symlink_to(around.canary / "folder"))
        draws.choice(makers)()
    return f"{entry.relative_to(root)!s} added"


def _worker(root: Path, file: Path, around: Surroundings, draws: random.Random) -> str:
    """Claim that the canary process is this run's worker or controller, and leave the attempt unfinished."""
    workers = [*root.glob("work/*/attempt_*/worker.json"), *root.glob("controllers/*.json")]
    for worker in workers:
        record = {"host": socket.gethostname(), "pids": os.readlink("/proc/self/ns/pid"), "pid": around.process}
        forged = with_checksum(record | {"started": process_start_time(around.process)}).encode()
        _put(worker, forged)
        _put(worker.with_name("claim.json"), forged)
        if worker.with_name("outcome.json").is_file():
            worker.with_name("outcome.json").unlink()
        shutil.rmtree(root / "artifacts" / worker.parent.parent.name, ignore_errors=True)
    return f"{len(workers)} records"


def _setting(root: Path, file: Path, around: Surroundings, draws: random.Random) -> str:
    """Change a setting and seal the configuration."""
    config = root / "config.yaml"
    if not config.is_file() or config.stat().st_size > LARGEST_CHANGED:
        return "nothing"
    try:
        settings = yaml.safe_load(config.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return "nothing"
    if not isinstance(settings, dict):
        return "nothing"
    island = {"address": "http://127.0.0.1:9", "token_file": str(around.canary / "file"), "storage": str(around.canary)}
    key, value = draws.choice(
        [
            ("name", draws.choice([value for value in VALUES if isinstance(value, str) and value.isascii()])),
            ("folder", str(around.canary)),
            ("data.path", str(around.canary)),
            ("expert.init", str(around.canary)),
            ("compute", {"backend": "ray", "address": "127.0.0.1:9"}),
            ("compute", {"backend": "islands", "islands": {"[/red]x": island}}),
            ("compute", {"backend": "islands", "islands": {"x": island}}),
            ("compute", {"backend": "slurm", "slurm": {"slurm_comment": "x\nrm -rf ~"}}),
            ("compute", {"backend": "slurm", "slurm": {"slurm_setup": ["touch new"]}}),
            ("wandb.mode", "online"),
            ("partition.num_experts", 10**9),
            ("format", draws.choice([1, 3, "x", None, []])),
            (draws.choice(sorted(settings)), draws.choice(VALUES[:10])),
        ]
    )
    *parents, last = key.split(".")
    place = settings
    for parent in parents:
        place = place[parent] if isinstance(place.get(parent), dict) else place
    place[last] = value
    text = yaml.safe_dump(settings, sort_keys=False)
    _put(config, f"{CONFIG_SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n{text}".encode())
    return f"{key}={value!r:.60}"


PIPELINE_WAYS = (_link_file, _link_folder, _hard_link, _special, _huge, _foreign_content, _value, _value, _entry)
RUN_WAYS = (_worker, _setting, _setting, _value)


def seal(root: Path, file: Path) -> None:
    """Record a changed file in the manifest of its artifact."""
    artifact = next((place for place in file.parents if (place / MANIFEST).is_file() and place != root.parent), None)
    if artifact is None or file.name == MANIFEST:
        return
    try:
        manifest = read_manifest(artifact)
    except ArtifactError:
        return  # an earlier way has damaged it
    sums = manifest.checksums | {str(file.relative_to(artifact)): checksum(file)}
    _put(artifact / MANIFEST, with_checksum(replace(manifest, checksums=sums)).encode())


def _put(path: Path, content: bytes) -> None:
    """Replace a file, and not what it may link to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def _replace(path: Path, make: Callable[[], object], detail: str) -> str:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    make()
    return detail


def _make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(path.parent, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{folder}/{path.name}")  # a path of a socket has at most 107 characters
        os.close(folder)


def _make_device(path: Path, minor: int) -> None:
    """Make /dev/zero (5) or /dev/full (7) here, or an empty file for a user who may not."""
    try:
        os.mknod(path, 0o20666, os.makedev(1, minor))
    except PermissionError:
        path.touch()


def _safetensors(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0\0\0\0"


def _npy(header: str) -> bytes:
    return struct.pack("<H", len(header) + 1) + header.encode() + b"\n" + PICKLE % b"new"
