"""The code that runs now as a wheel, from a checkout or an installed wheel alike, to be sent to islands.

The same code gives the same bytes. Its version ends with a hash of the content, since Ray caches wheels by file name.
It names no dependencies: an island's own Python has them.
"""

import base64
import hashlib
import importlib.util
import os
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from orchestrator.errors import OrchestratorError

PROJECT = "decentralized-diffusion"
PACKAGES = ("ddm_core", "data_partition", "experts", "router", "ensemble", "orchestrator", "cluster_configs")

EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time that every file in the wheel has: the earliest that zip knows."""


def build_wheel(folder: Path) -> Path:
    """Write the wheel into a folder and return its path; one that is there already has the same bytes."""
    contents = {name: path.read_bytes() for name, path in sorted(_files())}
    release = f"{project_release()}+{_digest(contents)[:12]}"
    name = f"{PROJECT.replace('-', '_')}-{release}"
    wheel = folder / f"{name}-py3-none-any.whl"
    if not wheel.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{wheel.name}.{os.getpid()}"
        _write_zip(temporary, contents | _metadata(f"{name}.dist-info", release, contents))
        temporary.replace(wheel)
    return wheel


def project_release() -> str:
    """The project's version without a content hash: of the checkout if this is one, or as installed."""
    declared = _folder("ddm_core").with_name("pyproject.toml")
    if declared.is_file():
        return str(tomllib.loads(declared.read_text(encoding="utf-8"))["project"]["version"])
    try:
        return version(PROJECT).partition("+")[0]
    except PackageNotFoundError:
        raise OrchestratorError(
            f"{PROJECT} is neither a checkout nor installed, so the code for the islands has no version; install it"
        ) from None


def _files() -> Iterator[tuple[str, Path]]:
    """Every file of the project by its path in the wheel; what Python and editors leave behind is left out."""
    for package in PACKAGES:
        root = _folder(package)
        for path in root.rglob("*"):
            name = path.relative_to(root.parent)
            is_left_behind = "__pycache__" in name.parts or path.name.startswith(".") or path.name.endswith("~")
            if path.is_file() and not is_left_behind:
                yield name.as_posix(), path


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise OrchestratorError(f"the package {package} is not installed; install {PROJECT} again")
    return Path(next(iter(found.submodule_search_locations)))


def _digest(contents: Mapping[str, bytes]) -> str:
    hashed = hashlib.sha256()
    for name, data in contents.items():
        hashed.update(f"{name}\0{len(data)}\0".encode() + data)
    return hashed.hexdigest()


def _metadata(folder: str, release: str, contents: dict[str, bytes]) -> dict[str, bytes]:
    """The three files that make a zip a wheel."""
    texts = {
        f"{folder}/METADATA": f"Metadata-Version: 2.1\nName: {PROJECT}\nVersion: {release}\nRequires-Python: >=3.11\n",
        f"{folder}/WHEEL": "Wheel-Version: 1.0\nGenerator: ddm\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    described = {name: text.encode() for name, text in texts.items()}
    record = f"{folder}/RECORD"
    lines = [_record(name, data) for name, data in (contents | described).items()]
    return described | {record: "\n".join([*lines, f"{record},,\n"]).encode()}


def _record(name: str, data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}"


def _write_zip(path: Path, contents: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = 0o644 << 16
            entry.create_system = 3
            entry.compress_type = zipfile.ZIP_STORED if name.endswith(".gz") else zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
