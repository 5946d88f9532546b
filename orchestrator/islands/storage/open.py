"""Open the object store that a URL names; refuse URLs and options that are not on the list."""

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.islands.storage.errors import StorageError
from orchestrator.islands.storage.local_store import LocalStore
from orchestrator.islands.storage.object_store import ObjectStore
from orchestrator.islands.storage.remote_store import RemoteStore


def split_url(url: str) -> tuple[str, str]:
    """Scheme and path of a storage's URL; raises `StorageError` for all but the schemes on the list."""
    if url.startswith("/") and "::" not in url:
        return "file", url.rstrip("/") or "/"
    parts = urlsplit(url)
    path = f"{parts.netloc}{parts.path}".rstrip("/")
    strange = set("@?#*[]\\") & set(url) or "::" in url or {"..", "."} & set(path.split("/"))
    if parts.scheme not in ("file", "s3", "gs", "gcs", "memory") or not path or strange:
        raise StorageError(
            f"a storage is an absolute folder or a plain URL that starts with file:, s3:, gs: or memory:, not {url!r}; "
            "credentials belong into the environment"
        )
    if parts.scheme == "file" and (parts.netloc or not parts.path.startswith("/")):
        raise StorageError(f"a local folder is written file:///absolute/path, not {url!r}")
    return parts.scheme.replace("gcs", "gs"), path


def open_store(url: str, options: Mapping[str, str]) -> ObjectStore:
    """The objects below a URL; raises `StorageError` for a URL, an option or a driver that cannot be used."""
    scheme, path = split_url(url)
    if scheme != "file":
        return RemoteStore(scheme, path, options)
    if options:
        raise StorageError(f"a local folder has no options, not {', '.join(options)}; remove storage_options of {url}")
    return LocalStore(Path(path))
