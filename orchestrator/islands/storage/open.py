"""Open the object store of a URL; refuse URLs and options that are not on the list."""

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.islands.storage.errors import StorageError
from orchestrator.islands.storage.local_store import LocalStore
from orchestrator.islands.storage.object_store import ObjectStore
from orchestrator.islands.storage.remote_store import RemoteStore


def split_url(url: str) -> tuple[str, str]:
    """Return scheme and path of a storage's URL; raise `StorageError` for any scheme that is not on the list."""
    if url.startswith("/") and "::" not in url:
        return "file", url.rstrip("/") or "/"
    parts = urlsplit(url)
    path = f"{parts.netloc}{parts.path}".rstrip("/")
    has_extras = set("@?#*[]\\") & set(url) or "::" in url or {"..", "."} & set(path.split("/"))
    if parts.scheme not in ("file", "s3", "gs", "gcs", "memory") or not path or has_extras:
        raise StorageError(
            f"a storage is an absolute folder or a plain URL that starts with file:, s3:, gs: or memory:, not {url!r}; "
            "put credentials into the environment"
        )
    if parts.scheme == "file" and (parts.netloc or not parts.path.startswith("/")):
        raise StorageError(f"a local folder is written file:///absolute/path, not {url!r}")
    return parts.scheme.replace("gcs", "gs"), path


def open_store(url: str, options: Mapping[str, str]) -> ObjectStore:
    """Open the object store of a URL; raise `StorageError` for an invalid URL or option, or a missing driver."""
    scheme, path = split_url(url)
    if scheme != "file":
        return RemoteStore(scheme, path, options)
    if options:
        raise StorageError(f"a local folder has no options, not {', '.join(options)}; remove storage_options of {url}")
    return LocalStore(Path(path))
