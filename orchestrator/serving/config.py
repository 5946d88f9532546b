"""Settings of the service: its address, what a request may ask for, and how requests are batched."""

from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import ConfigError
from orchestrator.islands.token import is_loopback


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may want, and how many wait."""

    images: int = 16
    """Most images of one request."""
    steps: int = 100
    """Most solver steps."""
    prompt_characters: int = 4000
    """Longest prompt."""
    queue: int = 64
    """Most images that wait or are sampled; further requests get 429."""
    deadline_s: float = 120.0
    """Longest time of a request, after which it gets 408."""
    body_bytes: int = 100_000
    """Largest body of a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How requests share the networks."""

    max_images: int = 16
    """Most images of a batch."""
    wait_s: float = 0.005
    """How long an image waits for others of its expert while nothing is sampled."""
    resident: int | None = None
    """Most experts in memory of a replica; None is all."""
    threads: int = 1
    """Threads of a replica; images are equal bit for bit between replicas with equal numbers."""


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many replicas sample at a time, by load."""

    least: int = 1
    """0 ends the last one when no request has come for `idle_s`; the next request waits for a new one."""
    most: int = 1
    idle_s: float = 600.0

    @classmethod
    def parse(cls, text: str, idle_s: float = idle_s) -> "Replicas":
        """Read `2` or `0-4`; raise `ConfigError` for anything else."""
        least, _, most = text.partition("-")
        if not (least.isdecimal() and (most or least).isdecimal()) or not max(1, int(least)) <= int(most or least):
            raise ConfigError(f"--replicas is a number such as 2, or a range such as 0-4; got {text!r}")
        return cls(int(least), int(most or least), idle_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """Everything about a service but its models."""

    host: str = "127.0.0.1"
    port: int = 8000
    key_file: Path | None = None
    """File of mode 600 with one API key a line; an address other than loopback needs it."""
    log_prompts: bool = False
    """Whether the log has the prompts of requests."""
    limits: Limits = Limits()
    batching: Batching = Batching()
    replicas: Replicas | None = Replicas()
    """None samples in this process, without Ray."""
    address: str | None = None
    """Head of a running Ray cluster, or `auto`; None starts a cluster on loopback that ends with the service."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for an open address without keys, and for limits that no request can meet."""
        if not self.is_loopback and self.key_file is None:
            raise ConfigError(
                f"--host {self.host} can be reached from other machines, so it needs --keys, a file of mode 600 with "
                "one API key a line; or leave --host out"
            )
        if self.address is not None and self.replicas is None:
            raise ConfigError("--inline samples without Ray, so it has no --address; leave one of the two out")
        if (self.address or "").startswith("ray://"):
            raise ConfigError(
                f"--address is HOST:PORT of the head of a Ray cluster whose node this machine is, or auto; got "
                f"{self.address}, which is for Ray's client on another machine"
            )
        if self.limits.images > self.limits.queue:
            raise ConfigError(
                f"a request of {self.limits.images} images never fits into a queue of {self.limits.queue}; raise "
                "--queue or lower --max-images"
            )

    @property
    def is_loopback(self) -> bool:
        """Return whether only this machine reaches the service."""
        return is_loopback(self.host)
