"""List the listening sockets of processes, from /proc."""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path


@dataclass(frozen=True)
class Listener:
    """A TCP socket that accepts connections."""

    address: IPv4Address | IPv6Address
    port: int
    pid: int

    @property
    def is_loopback(self) -> bool:
        """Return whether only this machine reaches it."""
        mapped = getattr(self.address, "ipv4_mapped", None)
        return (mapped or self.address).is_loopback


def list_listeners(processes: Iterable[int]) -> list[Listener]:
    """Return every listening TCP socket of these processes."""
    open_sockets = {inode: pid for pid in processes for inode in _list_socket_inodes(pid)}
    sockets = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in open_sockets:
                host, port = fields[1].split(":")
                sockets.append(Listener(_parse_address(host), int(port, 16), open_sockets[fields[9]]))
    return sorted(sockets, key=lambda listener: listener.port)


def _list_socket_inodes(pid: int) -> list[str]:
    inodes = []
    for entry in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.append(target.removeprefix("socket:[").removesuffix("]"))
    return inodes


def _parse_address(text: str) -> IPv4Address | IPv6Address:
    """Parse an address of /proc/net/tcp, which has words of four bytes in reversed order."""
    raw = bytes.fromhex(text)
    return ip_address(b"".join(raw[start : start + 4][::-1] for start in range(0, len(raw), 4)))
