"""One Ray cluster on this machine, as an island: its ports, its environment, its command.

It listens on loopback alone: on any node address but 127.0.0.1 Ray opens six of its ports on all interfaces. Ports that
answer whoever asks, without a token, are switched off.
"""

import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import IslandError
from orchestrator.islands.local.processes import MARK, TOKEN

ADDRESS = "127.0.0.1"

BLOCK = 100
"""Ports that are an island's own, of which its workers have the last eighty."""

PORTS = {
    "--port": 0,
    "--dashboard-port": 1,
    "--dashboard-agent-listen-port": 2,
    "--dashboard-agent-grpc-port": 3,
    "--runtime-env-agent-port": 4,
    "--metrics-export-port": 5,
    "--node-manager-port": 6,
    "--object-manager-port": 7,
    "--ray-client-server-port": 8,
    "--min-worker-port": 20,
    "--max-worker-port": 99,
}
"""Ray's options for ports, and where in the block each port is."""

SEARCHED = range(20_000, 32_000, BLOCK)
"""Where a free block is looked for: below the ports that the system hands out by itself."""

INHERITED = (
    "PATH",
    "LANG",
    "LC_ALL",
    "TZ",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "SSL_CERT_FILE",
    "no_proxy",
    "NO_PROXY",
)
"""What of our environment an island gets; not its secrets, and not the way to our code, which is sent as a wheel."""

OBJECT_STORE_BYTES = 80 * 2**20

SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # never replaces 127.0.0.1 by the machine's own address
    "RAY_enable_metrics_collection": "0",
    "DASHBOARD_METRIC_PORT": "-1",  # figures for Prometheus would be shown without a token: there is no such port
    "PYTHONUNBUFFERED": "1",
    "SPT_NOENV": "1",  # a process that gives itself a name keeps its environment, and so our mark
    "RAY_BACKEND_LOG_LEVEL": "error",
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The one node of a local island."""

    folder: Path
    """What stays: token, storage, log. Its path is the mark of all its processes."""
    scratch: Path
    """What goes with the island; short, because Ray's sockets lie in it."""
    first_port: int
    cpus: int
    is_durable: bool
    """Whether Ray keeps what it knows on disk, so that it remembers its jobs after its own death."""
    environment: Mapping[str, str]
    """Added to the environment of all its processes, such as a storage's credentials."""
    autoscaling: Path | None = None
    """What an autoscaler reads, which starts and ends nodes beside this one; without it this is the only node."""

    @property
    def address(self) -> str:
        """Its dashboard."""
        return f"http://{ADDRESS}:{self.first_port + PORTS['--dashboard-port']}"

    @property
    def agent(self) -> str:
        """Its agent, which starts jobs, and comes last."""
        return f"http://{ADDRESS}:{self.first_port + PORTS['--dashboard-agent-listen-port']}"

    @property
    def working_directory(self) -> Path:
        """An empty folder: Ray's processes import whatever lies where they start."""
        return self.scratch / "empty"

    @property
    def log(self) -> Path:
        """What its processes print."""
        return self.folder / "head.log"

    def launch(self) -> subprocess.Popen[bytes]:
        """Start it, in a session of its own."""
        with self.log.open("wb") as log:
            return subprocess.Popen(
                self.command(),
                cwd=self.working_directory,
                env=self.whole_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def command(self) -> list[str]:
        """The command that runs it until it is killed."""
        options = {
            "--node-ip-address": ADDRESS,
            "--dashboard-host": ADDRESS,
            **{option: self.first_port + place for option, place in PORTS.items()},
            "--num-cpus": self.cpus,
            "--num-gpus": 0,
            "--object-store-memory": OBJECT_STORE_BYTES,
            "--temp-dir": self.scratch / "ray",
            "--include-log-monitor": "false",
            "--log-style": "record",
            "--log-color": "false",
        }
        given = [f"{option}={value}" for option, value in options.items()]
        scaling = f"--autoscaling-config={self.autoscaling}" if self.autoscaling else "--no-monitor"
        return [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", scaling, *given]

    def whole_environment(self) -> dict[str, str]:
        """The environment of all its processes, jobs included."""
        inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
        paths = f"{Path(sys.executable).parent}{os.pathsep}{inherited.get('PATH', os.defpath)}"
        own = {
            MARK: str(self.folder),
            "PATH": paths,
            "HOME": str(self.scratch / "home"),
            "TMPDIR": str(self.scratch / "tmp"),
            "RAY_AUTH_TOKEN_PATH": str(self.folder / TOKEN),
        }
        kept = (
            {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(self.scratch / "gcs")} if self.is_durable else {}
        )
        return inherited | SETTINGS | own | kept | dict(self.environment)

    def make_folders(self) -> None:
        """Make everything that must be there before it starts."""
        for folder in (self.folder, self.working_directory, self.scratch / "home", self.scratch / "tmp"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def new_scratch() -> Path:
    """A folder for one island's temporary files that only we can read."""
    return Path(tempfile.mkdtemp(prefix="ddm-"))


def free_blocks(count: int, first: int | None) -> list[int]:
    """The first ports of as many blocks that nobody uses, from `first` on or anywhere; raises `IslandError`."""
    wanted = [first + BLOCK * number for number in range(count)] if first else random.sample(SEARCHED, len(SEARCHED))
    found: list[int] = []
    for block in wanted:
        if len(found) < count and _is_free(block):
            found.append(block)
    if len(found) < count:
        raise IslandError(
            f"{count} island(s) need {BLOCK} free ports each, from {min(wanted)} to {max(wanted) + BLOCK - 1}, and "
            "other processes use some of them; end those (`ss -tnap` names them)"
        )
    return found


def _is_free(block: int) -> bool:
    for port in range(block, block + BLOCK):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((ADDRESS, port))
            except OSError:
                return False
    return True
