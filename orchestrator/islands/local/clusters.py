"""Islands on this machine: real Ray clusters that know nothing of each other, each with ports and a token of its own.

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
from orchestrator.config.compute import IslandConfig
from orchestrator.errors import IslandError
from orchestrator.islands.local.processes import FOLDER, STATE, TOKEN, kill_marked, marked_processes, send, take_down
from orchestrator.islands.local.ray_head import Head, free_blocks, new_scratch
from orchestrator.islands.token import new_token

FIRST_PORT = 19_000
"""Where the ports of `ddm islands up` begin, a hundred an island."""

LISTED = ("island_1", "island_2")
"""The islands that islands_local.yaml names, in the folder above, with the ports above, one CPU each."""


def describe(folder: Path, islands: Mapping[str, IslandConfig]) -> str:
    """Write the islands into `islands.yaml`, as a file of the group `compute`, and say how to use them."""
    written = folder / "islands.yaml"
    write_text(written, yaml.safe_dump({"backend": "islands", "islands": to_jsonable(islands)}, sort_keys=False))
    words = shlex.join(overrides(islands, is_usual=folder == FOLDER.expanduser()))
    ending = "" if folder == FOLDER.expanduser() else f" --folder {shlex.quote(str(folder))}"
    commands = (f"islands check {words}", f"run experiment=digits {words}", f"islands down{ending}")
    said = f"{', '.join(islands)} are up; as a configuration: {written}"
    return "\n".join([said, *(f"  ddm {command}" for command in commands)])


def overrides(islands: Mapping[str, IslandConfig], *, is_usual: bool) -> list[str]:
    """What `ddm run` must be given to use these islands and no others; `is_usual` for those in the usual folder."""
    words = ["compute=islands_local", *(f"~compute.islands.{name}" for name in LISTED if name not in islands)]
    for name, island in islands.items():
        keys = {"token_file": island.token_file, "storage": island.storage}
        if name not in LISTED:
            keys |= {"address": island.address}
        if name not in LISTED or not is_usual:
            words += [f'++compute.islands.{name}.{key}="{value}"' for key, value in keys.items()]
        if island.cpus > 1:
            words.append(f"++compute.islands.{name}.cpus={island.cpus}")
    return words


START_S = 120.0
"""An island may take so long to take jobs; the first start after an installation reads much from the disk."""


@dataclass
class LocalIslands:
    """As many islands as asked for, named island_1, island_2, …; they end with the block, or with this process.

    `up` alone starts islands that outlive whoever started them, until `keeper.take_down`.
    """

    folder: Path
    count: int = 2
    cpus: int = 1
    storage: str | None = None
    """URL that the islands' storages lie below; each one's own local folder when empty."""
    storage_options: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to the islands' environment, such as the storage's credentials."""
    is_durable: bool = False
    """Whether Ray remembers its jobs after its own death."""
    first_port: int | None = None
    """Where the ports begin, a hundred an island; free ones when empty."""
    _heads: dict[str, Head] = field(default_factory=dict, repr=False)
    _running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.folder = self.folder.expanduser().resolve()

    def __enter__(self) -> Self:
        """Start them all and wait until they take jobs; raises `IslandError` if the folder has running ones."""
        self._refuse_running()
        self.folder.mkdir(parents=True, exist_ok=True)
        keeper = [sys.executable, "-m", "orchestrator.islands.local.processes", str(self.folder)]
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self._keeper = subprocess.Popen(
            keeper, stdin=subprocess.PIPE, start_new_session=True, env=os.environ | {"PYTHONPATH": path}
        )
        try:
            return self.up()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill them all and delete what is temporary."""
        self._keeper.communicate()
        take_down(self.folder)
        for process in self._running.values():
            process.wait()

    def up(self) -> Self:
        """Start them all and wait until they take jobs; raises `IslandError` if the folder has running ones."""
        self._refuse_running()
        take_down(self.folder)
        try:
            self._start_all()
        except BaseException:
            take_down(self.folder)
            raise
        return self

    @property
    def configs(self) -> dict[str, IslandConfig]:
        """What a run's configuration says of them, by name."""
        return {
            name: IslandConfig(
                address=head.address,
                token_file=str(head.folder / TOKEN),
                storage=self._storage(name),
                storage_options=dict(self.storage_options),
                cpus=self.cpus,
            )
            for name, head in self._heads.items()
        }

    def processes(self, name: str) -> list[int]:
        """Every process of an island, its jobs' included."""
        return marked_processes(str(self._heads[name].folder))

    def kill(self, name: str) -> None:
        """SIGKILL every process of an island at once; its token, address and storage stay for `start`."""
        kill_marked(str(self._heads[name].folder))
        self._running[name].wait()

    def start(self, name: str) -> None:
        """Start a killed island again, with the same address and token, and wait until it takes jobs."""
        self._launch(name)
        self._wait(name)

    def freeze(self, name: str, what: Literal["dashboard", "all"] = "dashboard") -> None:
        """Stop an island's answers, or everything on it, in the middle of whatever it does."""
        found = self.processes(name)
        send(found if what == "all" else [pid for pid in found if _is_dashboard(pid)], SIGSTOP)

    def thaw(self, name: str) -> None:
        """Let everything that was frozen go on."""
        send(self.processes(name), SIGCONT)

    def _start_all(self) -> None:
        for number, block in enumerate(free_blocks(self.count, self.first_port), start=1):
            self._heads[f"island_{number}"] = self._new_head(f"island_{number}", block)
        for name in self._heads:
            self._launch(name)
        for name in self._heads:
            self._wait(name)

    def _new_head(self, name: str, block: int) -> Head:
        head = Head(
            folder=self.folder / name,
            scratch=new_scratch(),
            first_port=block,
            cpus=self.cpus,
            is_durable=self.is_durable,
            environment=self.environment,
        )
        head.make_folders()
        write_json(head.folder / STATE, {"scratch": str(head.scratch), "address": head.address})
        (head.folder / TOKEN).unlink(missing_ok=True)
        new_token(head.folder / TOKEN)
        if self.storage is None:
            Path(self._storage(name)).mkdir(exist_ok=True)
        return head

    def _storage(self, name: str) -> str:
        return f"{self.storage.rstrip('/')}/{name}" if self.storage else str(self.folder / name / "storage")

    def _refuse_running(self) -> None:
        running = [state.parent.name for state in self.folder.glob(f"*/{STATE}") if marked_processes(str(state.parent))]
        if running:
            raise IslandError(
                f"{', '.join(running)} in {self.folder} are running already; end them with "
                f"`ddm islands down --folder {self.folder}`, or start others in another folder"
            )

    def _launch(self, name: str) -> None:
        self._running[name] = self._heads[name].launch()

    def _wait(self, name: str) -> None:
        """Wait until the island takes jobs.

        A start that dies is tried once more: Ray gives a node 30 s, and its files may come from a cold disk.
        """
        deadline, may_try_again = time.monotonic() + START_S, True
        while not self._takes_jobs(name):
            has_died = self._running[name].poll() is not None
            if time.monotonic() > deadline or (has_died and not may_try_again):
                raise IslandError(f"{name} has not started: {self._last_words(name)}")
            if has_died:
                may_try_again = False
                self.kill(name)
                self._launch(name)
            time.sleep(0.1)

    def _takes_jobs(self, name: str) -> bool:
        head = self._heads[name]
        authorized = {"Authorization": f"Bearer {(head.folder / TOKEN).read_text()}"}
        asked = (f"{head.address}/api/version", f"{head.agent}/api/local_raylet_healthz")
        try:
            return all(requests.get(url, headers=authorized, timeout=2).ok for url in asked)
        except requests.RequestException:
            return False

    def _last_words(self, name: str) -> str:
        head = self._heads[name]
        lines = head.log.read_text(errors="replace").splitlines()
        return f"{' / '.join(lines[-5:])} (Ray's logs: {head.scratch}/ray/session_latest/logs)"


def _is_dashboard(pid: int) -> bool:
    """Whether a process answers the Jobs API."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"dashboard/dashboard.py" in command
