"""Islands on this machine: real, separate Ray clusters, each with its own ports and token.

with LocalIslands(folder, count=2) as islands:
    islands.configs["island_1"], islands.kill("island_1"), islands.start("island_1")
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGCONT, SIGSTOP
from types import TracebackType
from typing import Literal, Self

import requests
import yaml

from ddm_core.artifacts import to_jsonable, write_json, write_text
from orchestrator.backends.proxies import bypass_proxies_on_loopback
from orchestrator.config.compute import IslandConfig
from orchestrator.errors import IslandError
from orchestrator.islands.local.processes import FOLDER, STATE, TOKEN, create_scratch, take_down
from orchestrator.islands.local.ray_head import Head, find_free_blocks
from orchestrator.islands.token import create_token
from orchestrator.run.marked_processes import find_marked_processes, kill_marked_processes, send_signal

FIRST_PORT = 19_000
"""First port of `ddm islands up`; each island has a hundred."""

CONFIGURED = ("island_1", "island_2")
"""Islands in islands_local.yaml: in `FOLDER`, with ports from `FIRST_PORT`, one CPU each."""


def write_config(folder: Path, islands: Mapping[str, IslandConfig]) -> str:
    """Write the islands to `islands.yaml`, a file of the group `compute`; return the commands to use them."""
    path = folder / "islands.yaml"
    write_text(path, yaml.safe_dump({"backend": "islands", "islands": to_jsonable(islands)}, sort_keys=False))
    in_default_folder = folder == FOLDER.expanduser()
    overrides = shlex.join(build_overrides(islands, in_default_folder=in_default_folder))
    folder_option = "" if in_default_folder else f" --folder {shlex.quote(str(folder))}"
    commands = (f"islands check {overrides}", f"run experiment=digits {overrides}", f"islands down{folder_option}")
    summary = f"{', '.join(islands)} are up; as a configuration: {path}"
    return "\n".join([summary, *(f"  ddm {command}" for command in commands)])


def build_overrides(islands: Mapping[str, IslandConfig], *, in_default_folder: bool) -> list[str]:
    """Return the overrides for `ddm run` on these islands; set `in_default_folder` if they are in `FOLDER`."""
    overrides = ["compute=islands_local", *(f"~compute.islands.{name}" for name in CONFIGURED if name not in islands)]
    for name, island in islands.items():
        keys = {"token_file": island.token_file, "storage": island.storage}
        if name not in CONFIGURED:
            keys |= {"address": island.address}
        if name not in CONFIGURED or not in_default_folder:
            overrides += [f'++compute.islands.{name}.{key}="{value}"' for key, value in keys.items()]
        if island.cpus > 1:
            overrides.append(f"++compute.islands.{name}.cpus={island.cpus}")
    return overrides


START_S = 120.0
"""Longest wait until an island accepts jobs; the first start after an installation reads much from the disk."""


@dataclass
class LocalIslands:
    """`count` islands named island_1, island_2, …; they end with the `with` block, or with this process.

    Islands that `up` starts outside a `with` block outlive this process, until `processes.take_down`.
    """

    folder: Path
    count: int = 2
    cpus: int = 1
    storage: str | None = None
    """URL below which the islands' storages are; None is a local folder for each island."""
    storage_options: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to the islands' environment, such as the storage's credentials."""
    is_durable: bool = False
    """Whether Ray's job list survives a restart."""
    first_port: int | None = None
    """First port, each island has a hundred; None takes free ones."""
    _heads: dict[str, Head] = field(default_factory=dict, repr=False)
    _running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.folder = self.folder.expanduser().resolve()

    def __enter__(self) -> Self:
        """Start them all and wait until they accept jobs; raise `IslandError` if the folder has running ones."""
        self._check_none_running()
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-P", "-m", "orchestrator.islands.local.processes", str(self.folder)]
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self._watchdog = subprocess.Popen(
            command, stdin=subprocess.PIPE, start_new_session=True, env=os.environ | {"PYTHONPATH": path}
        )
        try:
            return self.up()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill them all and delete their temporary files."""
        self._watchdog.communicate()
        take_down(self.folder)
        for process in self._running.values():
            process.wait()

    def up(self) -> Self:
        """Start them all and wait until they accept jobs; raise `IslandError` if the folder has running ones."""
        bypass_proxies_on_loopback()
        self._check_none_running()
        take_down(self.folder)
        try:
            self._start_all()
        except BaseException:
            take_down(self.folder)
            raise
        return self

    @property
    def configs(self) -> dict[str, IslandConfig]:
        """Return their configuration for a run, by name."""
        return {
            name: IslandConfig(
                address=head.address,
                token_file=str(head.folder / TOKEN),
                storage=self._storage_url(name),
                storage_options=dict(self.storage_options),
                cpus=self.cpus,
            )
            for name, head in self._heads.items()
        }

    def list_processes(self, name: str) -> list[int]:
        """Return every process id of an island, its jobs included."""
        return find_marked_processes(str(self._heads[name].folder))

    def kill(self, name: str) -> None:
        """Send SIGKILL to every process of an island; its token, address and storage remain for `start`."""
        kill_marked_processes(str(self._heads[name].folder))
        self._running[name].wait()

    def start(self, name: str) -> None:
        """Start a killed island again, with the same address and token, and wait until it accepts jobs."""
        self._launch(name)
        self._wait_until_ready(name)

    def freeze(self, name: str, target: Literal["dashboard", "all"] = "dashboard") -> None:
        """Send SIGSTOP to an island's dashboard, or to all its processes."""
        processes = self.list_processes(name)
        send_signal(processes if target == "all" else [pid for pid in processes if _is_dashboard(pid)], SIGSTOP)

    def thaw(self, name: str) -> None:
        """Send SIGCONT to all processes of an island."""
        send_signal(self.list_processes(name), SIGCONT)

    def _start_all(self) -> None:
        for number, block in enumerate(find_free_blocks(self.count, self.first_port), start=1):
            self._heads[f"island_{number}"] = self._new_head(f"island_{number}", block)
        for name in self._heads:
            self._launch(name)
        for name in self._heads:
            self._wait_until_ready(name)

    def _new_head(self, name: str, block: int) -> Head:
        head = Head(
            folder=self.folder / name,
            scratch=create_scratch(),
            first_port=block,
            cpus=self.cpus,
            is_durable=self.is_durable,
            environment=self.environment,
        )
        head.make_folders()
        write_json(head.folder / STATE, {"scratch": str(head.scratch), "address": head.address})
        (head.folder / TOKEN).unlink(missing_ok=True)
        create_token(head.folder / TOKEN)
        if self.storage is None:
            Path(self._storage_url(name)).mkdir(exist_ok=True)
        return head

    def _storage_url(self, name: str) -> str:
        return f"{self.storage.rstrip('/')}/{name}" if self.storage else str(self.folder / name / "storage")

    def _check_none_running(self) -> None:
        running = [
            state.parent.name for state in self.folder.glob(f"*/{STATE}") if find_marked_processes(str(state.parent))
        ]
        if running:
            raise IslandError(
                f"{', '.join(running)} in {self.folder} are running already; end them with "
                f"`ddm islands down --folder {self.folder}`, or start others in another folder"
            )

    def _launch(self, name: str) -> None:
        self._running[name] = self._heads[name].launch()

    def _wait_until_ready(self, name: str) -> None:
        """Wait until the island accepts jobs; raise `IslandError` if it does not within `START_S`.

        A failed start is retried once: Ray allows a node 30 s, and its files may come from a cold disk.
        """
        deadline, may_retry = time.monotonic() + START_S, True
        while not self._accepts_jobs(name):
            has_exited = self._running[name].poll() is not None
            if time.monotonic() > deadline or (has_exited and not may_retry):
                raise IslandError(f"{name} has not started: {self._tail_log(name)}")
            if has_exited:
                may_retry = False
                self.kill(name)
                self._launch(name)
            time.sleep(0.1)

    def _accepts_jobs(self, name: str) -> bool:
        head = self._heads[name]
        headers = {"Authorization": f"Bearer {(head.folder / TOKEN).read_text()}"}
        urls = (f"{head.address}/api/version", f"{head.agent}/api/local_raylet_healthz")
        try:
            return all(requests.get(url, headers=headers, timeout=2).ok for url in urls)
        except requests.RequestException:
            return False

    def _tail_log(self, name: str) -> str:
        head = self._heads[name]
        lines = head.log.read_text(errors="replace").splitlines()
        return f"{' / '.join(lines[-5:])} (Ray's logs: {head.scratch}/ray/session_latest/logs)"


def _is_dashboard(pid: int) -> bool:
    """Return whether a process serves the Jobs API."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"dashboard/dashboard.py" in command
