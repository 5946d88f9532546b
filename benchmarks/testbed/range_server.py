"""An HTTP server on loopback that sends ranges of files, and fails on demand."""

import http.server
import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar


@dataclass
class Behavior:
    """How a server answers."""

    folder: Path
    failures: deque[str] = field(default_factory=deque)
    """Of the next requests, one each: a status such as `503`, or `cut`, which breaks off in the middle."""
    has_ranges: bool = True
    requests: list[str] = field(default_factory=list)
    """Path and range of every request."""


class _Handler(http.server.BaseHTTPRequestHandler):
    behavior: ClassVar[Behavior]

    def do_GET(self) -> None:
        behavior, asked = self.behavior, self.headers.get("Range")
        behavior.requests.append(f"{self.path} {asked}")
        failure = behavior.failures.popleft() if behavior.failures else ""
        path = behavior.folder / self.path.lstrip("/")
        if failure.isdigit() or not path.is_file():
            self.send_error(int(failure or 404))
            return
        content = path.read_bytes()
        first, last = 0, len(content) - 1
        if asked and behavior.has_ranges and (match := re.fullmatch(r"bytes=(\d+)-(\d+)", asked)):
            first, last = int(match[1]), min(int(match[2]), last)
            if first > last:
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        else:
            self.send_response(200)
        status = path.stat()
        self.send_header("ETag", f'"{status.st_mtime_ns:x}-{status.st_size:x}"')
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        data = content[first : last + 1]
        self.wfile.write(data[: len(data) // 2] if failure == "cut" else data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name in the base class
        """Say nothing."""


@contextmanager
def serve_ranges(folder: Path) -> Iterator[tuple[str, Behavior]]:
    """Serve a folder, and yield the server's address and its behavior, which may be changed meanwhile."""
    behavior = Behavior(folder)
    handler = type("Handler", (_Handler,), {"behavior": behavior})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", behavior
        finally:
            server.shutdown()
            thread.join()
