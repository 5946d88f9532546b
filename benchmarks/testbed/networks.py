"""Islands on separate networks: hosts that reach the controller but not each other, and links that fail.

Each island runs in a network namespace with one link, to the controller's side, which forwards no packets. `ip netns`
requires root.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.testbed.network_island import CREDENTIALS
from orchestrator.config.compute import IslandConfig


@dataclass(frozen=True, slots=True)
class Host:
    """One island's namespace and its link."""

    number: int

    @property
    def namespace(self) -> str:
        """Return the name of the namespace."""
        return f"ddm{self.number}"

    @property
    def link(self) -> str:
        """Return the name of the controller's end of the link; the island's end has the suffix `p`."""
        return f"ddmv{self.number}"

    def address(self, end: int) -> str:
        """Return an address on the link: end 1 is the controller's, 2 the island's."""
        return f"10.77.{self.number}.{end}"

    def create(self) -> None:
        """Create namespace, link and addresses; without a default route, no other address is reachable."""
        _ip("netns", "add", self.namespace)
        _ip("link", "add", self.link, "type", "veth", "peer", "name", f"{self.link}p", "netns", self.namespace)
        _ip("addr", "add", f"{self.address(1)}/30", "dev", self.link)
        _ip("link", "set", self.link, "up")
        self.run_inside("ip", "addr", "add", f"{self.address(2)}/30", "dev", f"{self.link}p")
        self.run_inside("ip", "link", "set", "lo", "up")
        self.run_inside("ip", "link", "set", f"{self.link}p", "up")

    def run_inside(self, *command: str) -> None:
        """Run a command in the island's namespace."""
        _ip("netns", "exec", self.namespace, *command)

    def disconnect(self) -> None:
        """Take the island's end of the link down; the controller keeps its route, so no packet takes another."""
        self.run_inside("ip", "link", "set", f"{self.link}p", "down")

    def reconnect(self) -> None:
        """Bring the link up again."""
        self.run_inside("ip", "link", "set", f"{self.link}p", "up")

    def can_reach(self, other: "Host", port: int) -> bool:
        """Return whether this island can connect to a port of the other one."""
        code = f"import socket; socket.create_connection(('{other.address(2)}', {port}), timeout=2)"
        command = ["ip", "netns", "exec", self.namespace, sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True).returncode == 0

    def transferred_bytes(self) -> int:
        """Return the bytes that the link has carried so far, in both directions."""
        folder = Path(f"/sys/class/net/{self.link}/statistics")
        return sum(int((folder / name).read_text()) for name in ("rx_bytes", "tx_bytes"))


def count_forwarded_packets() -> int:
    """Return the number of packets that the controller's side has forwarded between networks."""
    lines = [line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Ip:")]
    return int(dict(zip(lines[0], lines[1], strict=True))["ForwDatagrams"])


@contextlib.contextmanager
def separate_networks(folder: Path, count: int) -> Iterator[tuple[list[Host], dict[str, IslandConfig]]]:
    """Start `count` islands, each on a separate network.

    Raises:
        RuntimeError: This machine forwards packets.
    """
    if Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() != "0":
        raise RuntimeError("net.ipv4.ip_forward must be 0; got 1; run sysctl net.ipv4.ip_forward=0 first")
    os.environ.update(CREDENTIALS)
    hosts = [Host(number) for number in range(1, count + 1)]
    children: list[subprocess.Popen[str]] = []
    _ip("route", "add", "unreachable", "10.77.0.0/16", "metric", "4000")
    try:
        for host in hosts:
            host.create()
            children.append(_start_island(host, folder / f"host_{host.number}"))
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


def _start_island(host: Host, folder: Path) -> subprocess.Popen[str]:
    """Start the island's process; it prints its configuration on standard output."""
    command = [sys.executable, "-m", "benchmarks.testbed.network_island", str(folder), host.address(2)]
    return subprocess.Popen(
        ["ip", "netns", "exec", host.namespace, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
