"""One Ray cluster on this machine, as an island: its ports, its environment, its command.

It listens on loopback only: with any node address but 127.0.0.1, Ray opens six of its ports on all interfaces. Ports
that respond without a token are switched off.
"""

import os
import random
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import IslandError
from orchestrator.islands.local.processes import TOKEN
from orchestrator.run.marked_processes import KEEP_ENVIRONMENT, MARK

ADDRESS = "127.0.0.1"

BLOCK_SIZE = 100
"""Number of ports for one island; its workers have the last eighty."""

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
"""Ray's port options, with the offset of each port in the block."""

SEARCH_RANGE = range(20_000, 32_000, BLOCK_SIZE)
"""First ports of blocks that may be free: below the ports that the system assigns by itself."""

INHERITED_VARIABLES = (
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
"""Environment variables that an island inherits: no secrets, and no PYTHONPATH, since the code is sent as a wheel."""

OBJECT_STORE_BYTES = 80 * 2**20

RAY_SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # prevents Ray from replacing 127.0.0.1 by the machine's own address
    "RAY_enable_metrics_collection": "0",
    "DASHBOARD_METRIC_PORT": "-1",  # no port for Prometheus, which would need no token
    "PYTHONUNBUFFERED": "1",
    "PYTHONSAFEPATH": "1",
    **KEEP_ENVIRONMENT,
    "RAY_BACKEND_LOG_LEVEL": "error",
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The only node of a local island."""

    folder: Path
    """Token, storage and log, which remain after the island. Its path is the mark of all its processes."""
    scratch: Path
    """Temporary files, deleted with the island; its path is short, because it contains Ray's sockets."""
    first_port: int
    cpus: int
    is_durable: bool
    """Whether Ray stores its job list on disk, so that it survives a restart."""
    environment: Mapping[str, str]
    """Added to the environment of all its processes, such as a storage's credentials."""
    autoscaling: Path | None = None
    """Configuration of an autoscaler that starts and ends further nodes; without it this is the only node."""

    @property
    def address(self) -> str:
        """Return the URL of its dashboard."""
        return f"http://{ADDRESS}:{self.first_port + PORTS['--dashboard-port']}"

    @property
    def agent(self) -> str:
        """Return the URL of its agent, which starts jobs and is the last process to become ready."""
        return f"http://{ADDRESS}:{self.first_port + PORTS['--dashboard-agent-listen-port']}"

    @property
    def working_directory(self) -> Path:
        """Return an empty folder, because Ray's processes import modules from the folder in which they start."""
        return self.scratch / "empty"

    @property
    def log(self) -> Path:
        """Return the file with the output of its processes."""
        return self.folder / "head.log"

    def launch(self) -> subprocess.Popen[bytes]:
        """Start it, in its own session."""
        with self.log.open("wb") as log:
            return subprocess.Popen(
                self.build_command(),
                cwd=self.working_directory,
                env=self.build_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def build_command(self) -> list[str]:
        """Return the command that runs it until it is killed."""
        options = {
            "--node-ip-address": ADDRESS,
            "--dashboard-host": ADDRESS,
            **{option: self.first_port + offset for option, offset in PORTS.items()},
            "--num-cpus": self.cpus,
            "--num-gpus": 0,
            "--object-store-memory": OBJECT_STORE_BYTES,
            "--temp-dir": self.scratch / "ray",
            "--include-log-monitor": "false",
            "--log-style": "record",
            "--log-color": "false",
        }
        arguments = [f"{option}={value}" for option, value in options.items()]
        scaling = f"--autoscaling-config={self.autoscaling}" if self.autoscaling else "--no-monitor"
        return [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", scaling, *arguments]

    def build_environment(self) -> dict[str, str]:
        """Return the environment of all its processes, jobs included."""
        inherited = {name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ}
        paths = f"{Path(sys.executable).parent}{os.pathsep}{inherited.get('PATH', os.defpath)}"
        island = {
            MARK: str(self.folder),
            "PATH": paths,
            "HOME": str(self.scratch / "home"),
            "TMPDIR": str(self.scratch / "tmp"),
            "RAY_AUTH_TOKEN_PATH": str(self.folder / TOKEN),
        }
        durable = (
            {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(self.scratch / "gcs")} if self.is_durable else {}
        )
        return inherited | RAY_SETTINGS | island | durable | dict(self.environment)

    def make_folders(self) -> None:
        """Create the folders that must exist before it starts."""
        for folder in (self.folder, self.working_directory, self.scratch / "home", self.scratch / "tmp"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def find_free_blocks(count: int, first: int | None) -> list[int]:
    """Return the first ports of `count` unused blocks, consecutive from `first` or anywhere.

    Raises `IslandError` if there are fewer.
    """
    candidates = (
        [first + BLOCK_SIZE * number for number in range(count)]
        if first
        else random.sample(SEARCH_RANGE, len(SEARCH_RANGE))
    )
    blocks: list[int] = []
    for block in candidates:
        if len(blocks) < count and _is_free(block):
            blocks.append(block)
    if len(blocks) < count:
        last_port = max(candidates) + BLOCK_SIZE - 1
        raise IslandError(
            f"{count} island(s) need {BLOCK_SIZE} free ports each, from {min(candidates)} to {last_port}, and "
            "other processes use some of them; end those (`ss -tnap` names them)"
        )
    return blocks


def _is_free(block: int) -> bool:
    for port in range(block, block + BLOCK_SIZE):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((ADDRESS, port))
            except OSError:
                return False
    return True
