"""Keep the queries of URLs out of configurations, logs and artifacts: signed URLs carry their secret there.

`https://host/a.tar?signature=…` becomes `https://host/a.tar?hidden=<hash>` in a configuration. The query itself is a
file of mode 600 in this user's folder, so a run must be resumed by the same user, or with the URL given again.
"""

import contextlib
import hashlib
import os
import re
from pathlib import Path

from ddm_core.files.exclusive_files import create_file

USER_FOLDER = "DDM_HOME"
"""Environment variable with the folder of this user's own files; the default is `~/.ddm`."""

HASH = "[0-9a-f]{16}"
ADDRESS = rf"(?P<origin>[a-zA-Z0-9+.-]+://[^/\s?]*)(?P<path>(?:(?!://)[^\s?])*)\?(?!hidden={HASH}\b)"
QUERY = re.compile(ADDRESS + r"(?P<query>\S+)")
QUERY_IN_BRACES = re.compile(ADDRESS + r"(?P<query>[^\s,}]+)")
HIDDEN = re.compile(rf"(?P<origin>[a-zA-Z0-9+.-]+://[^/\s?]*)(?P<path>[^\s?]*)\?hidden=(?P<name>{HASH})\b")
SECRET = re.compile(r"(?<=://)[^/\s@]+@|(?<=\?)[^\s'\"<>)]+")
"""A user with a password, or a query; messages of other libraries have queries of URLs without their host."""


def user_folder() -> Path:
    """Return the folder of this user's own files."""
    return Path(os.environ.get(USER_FOLDER) or Path.home() / ".ddm")


def hide_queries(urls: str) -> str:
    """Replace the query of every URL by a hash, and store it for `reveal_query`; raises `OSError`."""
    return (QUERY_IN_BRACES if "{" in urls else QUERY).sub(_store, urls)


def reveal_query(url: str) -> str:
    """Return a URL with its own query; raises `KeyError` if this user has stored none for its host on this machine."""
    if (hidden := HIDDEN.search(url)) is None:
        return url
    path = _query_file(hidden["name"])
    query = path.read_text(encoding="utf-8") if path.is_file() else ""
    if hidden["name"] != _hash(hidden["origin"], query):
        raise KeyError(str(path))
    return f"{hidden['origin']}{hidden['path']}?{query}{url[hidden.end() :]}"


def without_secrets(text: str) -> str:
    """Return a text for a person: the queries and passwords of its URLs are dots."""
    return SECRET.sub(lambda secret: "…@" if secret[0].endswith("@") else "…", text)


def _store(match: re.Match[str]) -> str:
    query, name = match["query"], _hash(match["origin"], match["query"])
    path = _query_file(name)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.is_file() and path.read_text(encoding="utf-8") != query:
        path.unlink()  # a process was killed while it wrote the file
    with contextlib.suppress(FileExistsError):
        create_file(path, query.encode(), mode=0o600)
    return f"{match['origin']}{match['path']}?hidden={name}"


def _hash(origin: str, query: str) -> str:
    """Return a hash of host and query, so that no other host is ever sent the query."""
    return hashlib.sha256(f"{origin.lower()}\n{query}".encode()).hexdigest()[:16]


def _query_file(name: str) -> Path:
    return user_folder() / "queries" / name
