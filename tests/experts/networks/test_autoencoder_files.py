"""Autoencoders on the Hub: a server on this machine that answers as the Hub does, and none that answers."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "a" * 40
PATH = "owner/name/vae"
SCRIPT = f"""
import sys
from experts.networks.autoencoder_files import CodecConfig, find_folder, path_checksum, published_grid
config = CodecConfig(kind="autoencoder", path="{PATH}", path_checksum=path_checksum("{PATH}"))
assert published_grid(config).shape((16, 16, 3)) == (4, 8, 8)
print(config.path_checksum, *sorted(path.name for path in find_folder(config).iterdir()))
assert "torch" not in sys.modules
"""


class FakeHub(BaseHTTPRequestHandler):
    """Answers with the files of a folder as one repository with one commit."""

    def __init__(self, folder, *arguments):
        self.folder = folder
        super().__init__(*arguments)

    def do_GET(self):
        self.answer()

    do_HEAD = do_GET

    def answer(self):
        path = self.path.partition("?")[0]
        files = [file for file in sorted(self.folder.rglob("*")) if file.is_file()]
        if "/resolve/" in path:
            content = (self.folder / path.partition(f"/resolve/{COMMIT}/")[2]).read_bytes()
        elif "/tree/" in path:
            names = [str(file.relative_to(self.folder)) for file in files]
            content = json.dumps([{"type": "file", "path": name, "size": 1, "oid": COMMIT} for name in names]).encode()
        else:
            content = json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": []}).encode()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments):
        """Stay silent."""


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "repository"
    (folder / "vae").mkdir(parents=True)
    config = {"_class_name": "AutoencoderKL", "in_channels": 3, "latent_channels": 4, "block_out_channels": [8, 16]}
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    for name in ("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin", "vae/model.py", "x.py"):
        (folder / name).write_text(name)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(FakeHub, folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run_script(endpoint, home: Path):
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", SCRIPT]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_commit_is_recorded_and_only_needed_files_are_downloaded(hub, tmp_path):
    result = run_script(hub, tmp_path / "home")
    assert result.stdout.split() == [COMMIT, "config.json", "diffusion_pytorch_model.safetensors"], result.stderr


def test_hub_that_does_not_answer_is_one_clear_error(tmp_path):
    last = run_script("http://127.0.0.1:9", tmp_path / "home").stderr.strip().splitlines()[-1]
    assert last.startswith(f"experts.errors.CodecError: codec.path={PATH} is no folder here, and the Hub does not"), (
        last
    )
