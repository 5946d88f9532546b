"""Build a wheel of this project's running code, from a checkout or an installed wheel; it is sent to islands.

The same code produces a byte-identical wheel. Its version ends with a hash of the content, since Ray caches wheels by
file name. It lists no dependencies: an island's own Python has them.
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
"""Modification time of every file in the wheel: the earliest that zip can store."""


def build_wheel(folder: Path) -> Path:
    """Write the wheel into a folder and return its path; an existing one is byte-identical and is reused."""
    contents = {name: path.read_bytes() for name, path in sorted(_iter_files())}
    release = f"{read_version()}+{_hash_contents(contents)[:12]}"
    name = f"{PROJECT.replace('-', '_')}-{release}"
    wheel = folder / f"{name}-py3-none-any.whl"
    if not wheel.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{wheel.name}.{os.getpid()}"
        _write_zip(temporary, contents | _build_metadata(f"{name}.dist-info", release, contents))
        temporary.replace(wheel)
    return wheel


def read_version() -> str:
    """Return the project's version without a content hash, from the checkout if this is one, or as installed."""
    pyproject = _find_package_folder("ddm_core").with_name("pyproject.toml")
    if pyproject.is_file():
        return str(tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"])
    try:
        return version(PROJECT).partition("+")[0]
    except PackageNotFoundError:
        raise OrchestratorError(
            f"{PROJECT} is neither a checkout nor installed, so the code for the islands has no version; install it"
        ) from None


def _iter_files() -> Iterator[tuple[str, Path]]:
    """Yield every file of the project with its path in the wheel; skip files that Python and editors generate."""
    for package in PACKAGES:
        root = _find_package_folder(package)
        for path in root.rglob("*"):
            name = path.relative_to(root.parent)
            is_generated = "__pycache__" in name.parts or path.name.startswith(".") or path.name.endswith("~")
            if path.is_file() and not is_generated:
                yield name.as_posix(), path


def _find_package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise OrchestratorError(f"the package {package} is not installed; install {PROJECT} again")
    return Path(next(iter(spec.submodule_search_locations)))


def _hash_contents(contents: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, data in contents.items():
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def _build_metadata(folder: str, release: str, contents: dict[str, bytes]) -> dict[str, bytes]:
    """Return the three metadata files of a wheel, by path."""
    texts = {
        f"{folder}/METADATA": f"Metadata-Version: 2.1\nName: {PROJECT}\nVersion: {release}\nRequires-Python: >=3.11\n",
        f"{folder}/WHEEL": "Wheel-Version: 1.0\nGenerator: ddm\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    metadata = {name: text.encode() for name, text in texts.items()}
    record = f"{folder}/RECORD"
    lines = [_format_record(name, data) for name, data in (contents | metadata).items()]
    return metadata | {record: "\n".join([*lines, f"{record},,\n"]).encode()}


def _format_record(name: str, data: bytes) -> str:
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
