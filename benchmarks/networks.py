"""Islands on networks of their own: hosts that reach the controller and not each other, and links that fail.

Each island lives in a network namespace with one link, to the controller's side, which forwards nothing. Needs root,
for `ip netns`.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.network_island import CREDENTIALS
from orchestrator.config.compute import IslandConfig


@dataclass(frozen=True, slots=True)
class Host:
    """One island's namespace and its link."""

    number: int

    @property
    def namespace(self) -> str:
        """Name of the namespace."""
        return f"ddm{self.number}"

    @property
    def link(self) -> str:
        """The controller's end of the link; the island's end has a `p` behind it."""
        return f"ddmv{self.number}"

    def address(self, end: int) -> str:
        """1 is the controller's end, 2 the island's."""
        return f"10.77.{self.number}.{end}"

    def make(self) -> None:
        """Namespace, link and addresses; no default route, so that nothing else can be reached."""
        _ip("netns", "add", self.namespace)
        _ip("link", "add", self.link, "type", "veth", "peer", "name", f"{self.link}p", "netns", self.namespace)
        _ip("addr", "add", f"{self.address(1)}/30", "dev", self.link)
        _ip("link", "set", self.link, "up")
        self.inside("ip", "addr", "add", f"{self.address(2)}/30", "dev", f"{self.link}p")
        self.inside("ip", "link", "set", "lo", "up")
        self.inside("ip", "link", "set", f"{self.link}p", "up")

    def inside(self, *command: str) -> None:
        """Run a command on the island's side."""
        _ip("netns", "exec", self.namespace, *command)

    def cut(self) -> None:
        """Take the island's end of the link down; the controller keeps its route, so nothing goes elsewhere."""
        self.inside("ip", "link", "set", f"{self.link}p", "down")

    def mend(self) -> None:
        """Bring the link up again."""
        self.inside("ip", "link", "set", f"{self.link}p", "up")

    def reaches(self, other: "Host", port: int) -> bool:
        """Whether a connection from this island to the other one's storage comes about."""
        code = f"import socket; socket.create_connection(('{other.address(2)}', {port}), timeout=2)"
        command = ["ip", "netns", "exec", self.namespace, sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True).returncode == 0

    def carried(self) -> int:
        """Bytes that went over the link so far, both ways."""
        folder = Path(f"/sys/class/net/{self.link}/statistics")
        return sum(int((folder / name).read_text()) for name in ("rx_bytes", "tx_bytes"))


def forwarded() -> int:
    """Packets that the controller's side has passed from one network to another."""
    lines = [line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Ip:")]
    return int(dict(zip(lines[0], lines[1], strict=True))["ForwDatagrams"])


@contextlib.contextmanager
def separate_networks(folder: Path, count: int) -> Iterator[tuple[list[Host], dict[str, IslandConfig]]]:
    """As many islands as asked for, each on a network of its own."""
    if Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() != "0":
        raise RuntimeError("this machine forwards packets between its networks: set net.ipv4.ip_forward=0 first")
    os.environ.update(CREDENTIALS)
    hosts = [Host(number) for number in range(1, count + 1)]
    children: list[subprocess.Popen[str]] = []
    _ip("route", "add", "unreachable", "10.77.0.0/16", "metric", "4000")
    try:
        for host in hosts:
            host.make()
            children.append(_start(host, folder / f"host_{host.number}"))
        configs = {}
        for host, child in zip(hosts, children, strict=True):
            line = child.stdout.readline() if child.stdout else ""
            configs[f"island_{host.number}"] = IslandConfig(**json.loads(line))
        yield hosts, configs
    finally:
        for child in children:
            child.communicate()
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True)
        _ip("route", "del", "unreachable", "10.77.0.0/16", "metric", "4000")


def _start(host: Host, folder: Path) -> subprocess.Popen[str]:
    """The island's own process; what it says on its standard output is its configuration."""
    command = [sys.executable, "-m", "benchmarks.network_island", str(folder), host.address(2)]
    return subprocess.Popen(
        ["ip", "netns", "exec", host.namespace, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
