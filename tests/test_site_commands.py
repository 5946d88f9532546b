"""Every command of the site, executed page by page as a reader would: real processes, servers, clusters and pools.

Runs have few pictures and steps: `SMALL` is added to what the page says. What needs another machine is listed.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_house import ROOT, commands_in

WALK = [
    "docs/quickstart.md",
    "README.md",
    "docs/guides/scripts.md",
    "docs/guides/smaller.md",
    "docs/serving.md",
    "docs/ui.md",
    "docs/guides/own_pictures.md",
    "docs/guides/large_data.md",
    "docs/guides/training.md",
    "docs/guides/text_to_image.md",
    "docs/guides/publish.md",
    "docs/guides/two_clusters.md",
    "docs/guides/slurm.md",
    "docs/sweeps.md",
    "docs/pools.md",
]
ELSEWHERE = {
    r"git clone|make |pip install|\. \.venv": "the installation, which other tests do",
    r"hf auth|ssh |scp |ray dashboard": "an account, or a second machine",
    r"ddm pool (up|down) aws": "an account",
    r"ddm pool render aws_spot  ": "an account's network, which the line below names",
    r"compute=(mine|my_islands|my_pool)": "the reader's clusters",
    r"ddm stop": "a run at work; of a finished one it says so, with exit code 1",
    r"ddm submit": "a cluster that runs already",
    r"compute=slurm": "Slurm's sbatch",
    r"expert=pixart_xl_2|=facebook/": "downloaded models",
    r"s3://": "a bucket",
    r"list\|remove\|add": "a choice",
}
"""Commands that are parsed only, with what they need."""
SMALL = {
    "experiment=demo": (
        "data.limit=400",
        "expert.training.steps=20",
        "router.training.steps=20",
        "codec.decoder_training.steps=20",
        "ensemble.steps=4",
        "scores.num_samples=32",
    ),
    "experiment=emoji": (
        "expert.training.steps=4",
        "router.training.steps=4",
        "codec.decoder_training.steps=20",
        "scores.num_samples=32",
    ),
    "experiment=digits": ("data.limit=200", "router.training.steps=20", "scores.num_samples=32"),
    "data=image_folder": ("expert.training.steps=20", "router.training.steps=20", "compute=inline"),
    "--config pictures.yaml": ("expert.training.steps=20", "router.training.steps=20", "compute=inline"),
    "distill=sid": ("distill.training.steps=4",),
    "prune=laptop": ("prune.finetune.steps=4",),
    "n_trials=20": ("hydra.sweeper.n_trials=2",),
}
"""What is added behind a word of a command."""
FRESH = ("docs/guides/two_clusters.md", "docs/pools.md")
"""Pages whose run does not continue an earlier page's, since nothing would be left to do."""
SERVERS = {"ddm serve": "http://127.0.0.1:8000/healthz", "ddm ui": "http://127.0.0.1:8421/"}
pytestmark = [pytest.mark.integration, pytest.mark.timeout(3600), pytest.mark.usefixtures("no_server_left")]


@dataclass
class Desk:
    """A reader's shell: a folder of its own, a home with pictures, and servers that run meanwhile."""

    folder: Path
    environment: dict[str, str]
    servers: list[subprocess.Popen]

    def execute(self, line: str) -> None:
        """Run a line in bash; raises AssertionError with its output if it fails."""
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env=self.environment,
            input="y\n",
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, (line, done.stdout[-3000:], done.stderr[-3000:])

    def serve(self, line: str, health: str) -> None:
        """Start a server after the last one of its kind has ended, and wait until it answers."""
        self.stop_servers(line.split()[1])
        log = (self.folder / "server.log").open("w")
        server = subprocess.Popen(
            ["bash", "-c", f"exec {line}"], cwd=self.folder, env=self.environment, stdout=log, stderr=log
        )
        self.servers.append(server)
        deadline = time.monotonic() + 300
        while not answers(health):
            assert server.poll() is None and time.monotonic() < deadline, (
                line,
                (self.folder / "server.log").read_text(),
            )
            time.sleep(0.5)

    def stop_servers(self, kind: str = "") -> None:
        """Interrupt the servers whose command is `kind`, or all."""
        for server in [server for server in self.servers if kind in server.args[2]]:
            self.servers.remove(server)
            server.send_signal(signal.SIGINT)
            assert server.wait(60) in (0, 130), server.args


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except urllib.error.HTTPError as error:
        return error.code == 401  # a page that asks for its token
    except OSError:
        return False


def draw_pictures(folder: Path) -> None:
    """Write 48 pictures of two classes, with a caption beside each."""
    generator = np.random.default_rng(0)
    for index in range(48):
        kind = ("apps", "games")[index % 2]
        (folder / kind).mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 60, (32, 32, 3), dtype=np.uint8)
        pixels[index % 8 : 20, 4:28] += np.uint8(40 * (index % 4))
        Image.fromarray(pixels).save(folder / kind / f"{index}.png")
        (folder / kind / f"{index}.txt").write_text(f"a drawing of {kind}")


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("desk")
    home = folder / "home"
    draw_pictures(home / "pictures")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DDM_", "RAY_"))}
    environment |= {
        "HOME": str(home),
        "DDM_HOME": str(home / ".ddm"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "WANDB_MODE": "disabled",
    }
    made = Desk(folder, environment, [])
    yield made
    made.stop_servers()
    for command in ("ddm islands down", "ddm pool down local --yes"):  # of a page that failed half-way
        subprocess.run(["bash", "-c", command], cwd=folder, env=environment, check=False, capture_output=True)


@pytest.fixture
def no_server_left(desk: Desk) -> Iterator[None]:
    yield
    desk.stop_servers()


def as_written(line: str) -> str:
    """Return the line with the reader's names filled in and its run made small."""
    command = re.sub(r"\s#\s.*", "", line)
    command = command.replace("FOLDER", "~/pictures").replace("/mnt/shared/runs", "runs")
    command = command.replace("other=runs/other", "other=runs/digits")
    for word, overrides in SMALL.items():
        command = re.sub(
            rf"{re.escape(word)}(?= |$)", lambda match, more=overrides: " ".join([match[0], *more]), command
        )
    return command


def needs_elsewhere(line: str) -> bool:
    return any(re.search(pattern, line) for pattern in ELSEWHERE)


@pytest.mark.parametrize("page", WALK)
def test_commands_of_a_page_run(page: str, desk: Desk):
    executed = 0
    (desk.folder / "pictures.yaml").unlink(missing_ok=True)
    if page in FRESH:
        shutil.rmtree(desk.folder / "runs" / "digits", ignore_errors=True)
    for line in commands_in(ROOT / page):
        if needs_elsewhere(line):
            continue
        health = SERVERS.get(" ".join(shlex.split(line, comments=True)[:2]))
        if health:
            desk.serve(as_written(line), health)
        else:
            desk.execute(as_written(line))
        executed += 1
    assert executed or page in ("docs/guides/publish.md", "docs/guides/slurm.md")


def test_every_page_with_commands_is_walked():
    pages = {str(path.relative_to(ROOT)) for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]}
    assert {page for page in pages if commands_in(ROOT / page)} == set(WALK)


def test_every_exception_is_used():
    lines = [line for page in WALK for line in commands_in(ROOT / page)]
    assert not [pattern for pattern in ELSEWHERE if not any(re.search(pattern, line) for line in lines)]
