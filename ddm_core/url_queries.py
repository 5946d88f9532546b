"""Keep the queries of URLs out of configurations, logs and artifacts: signed URLs carry their secret there.

`https://host/a.tar?signature=…` becomes `https://host/a.tar?hidden=<hash>` in a configuration. The query itself is a
file of mode 600 in this user's folder, so a run must be resumed by the same user, or with the URL given again.
"""

import contextlib
import hashlib
import os
import re
from pathlib import Path

from ddm_core.artifacts import create_file

USER_FOLDER = "DDM_HOME"
"""Environment variable with the folder of this user's own files; the default is `~/.ddm`."""

QUERY = re.compile(r"\?(?!hidden=[0-9a-f]{16}\b)[^\s'\"<>)]+")
QUERY_IN_BRACES = re.compile(r"\?(?!hidden=[0-9a-f]{16}\b)[^\s,}]+")
HIDDEN = re.compile(r"\?hidden=([0-9a-f]{16})\b")
USER = re.compile(r"(?<=://)[^/\s@]+@")


def user_folder() -> Path:
    """Return the folder of this user's own files."""
    return Path(os.environ.get(USER_FOLDER) or Path.home() / ".ddm")


def hide_queries(urls: str) -> str:
    """Replace the query of every URL by its hash, and store it for `reveal_query`; raises `OSError`."""
    return (QUERY_IN_BRACES if "{" in urls else QUERY).sub(_store, urls)


def reveal_query(url: str) -> str:
    """Return a URL with its own query; raises `KeyError` if this user has not stored it on this machine."""
    if (hidden := HIDDEN.search(url)) is None:
        return url
    path = _query_file(hidden[1])
    if not path.is_file():
        raise KeyError(str(path))
    return url[: hidden.start()] + path.read_text(encoding="utf-8") + url[hidden.end() :]


def without_secrets(text: str) -> str:
    """Return a text for a person: the queries and passwords of its URLs are dots."""
    return USER.sub("…@", QUERY.sub("?…", HIDDEN.sub("?…", text)))


def _store(query: re.Match[str]) -> str:
    name = hashlib.sha256(query[0].encode()).hexdigest()[:16]
    path = _query_file(name)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.is_file() and path.read_text(encoding="utf-8") != query[0]:
        path.unlink()  # a process was killed while it wrote the file
    with contextlib.suppress(FileExistsError):
        create_file(path, query[0].encode(), mode=0o600)
    return f"?hidden={name}"


def _query_file(name: str) -> Path:
    return user_folder() / "queries" / name
