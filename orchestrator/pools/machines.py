"""The machines of a pool: its head, and its types of nodes."""

from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from artifacts import STRICT
from orchestrator.compute_config import Money

Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HeadConfig:
    """A machine. The head runs Ray and no stage; it is always on demand, since the pool ends with it."""

    machine: str = ""
    """The cloud's name of the machine type, such as g6.xlarge; unused by kuberay and local."""
    cpus: Annotated[int, Field(ge=1)] = 2
    """Its CPUs."""
    memory_gb: Annotated[float, Field(gt=0)] = 8.0
    """Its memory."""
    disk_gb: Annotated[int, Field(ge=10)] = 100
    """Its disk."""
    price_per_hour: Money = 0.0
    """What one costs, in the currency of your bill."""
    selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the Kubernetes nodes that may carry it; kuberay only."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NodeConfig(HeadConfig):
    """One type of node: one kind of GPU, spot or on demand."""

    gpu: str = ""
    """Kind of GPU as SkyPilot and Ray write it, such as L4 or A100-80GB; empty is a node without."""
    gpus: Count = 0
    """GPUs of one node."""
    accelerator: str = ""
    """Google's name of a GPU that is no part of the machine type, such as nvidia-tesla-t4; gcp only."""
    spot: bool = False
    """Whether it is cheap and may be taken away."""
    fallback: str | None = None
    """The on-demand type that stands in when this one cannot be had: Ray itself never changes over."""
    min_nodes: Count = 0
    """Nodes that stay while nothing runs."""
    max_nodes: Count = 1
    """Nodes at most; 0 withdraws the type."""
    losses_per_hour: Annotated[float, Field(ge=0)] = 0.0
    """How often one is lost, for `ddm plan`."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Check what no single field can."""
        if self.min_nodes > self.max_nodes:
            raise ValueError(f"min_nodes={self.min_nodes} is more than max_nodes={self.max_nodes}")
        if bool(self.gpu) != bool(self.gpus):
            raise ValueError(f"gpu={self.gpu!r} and gpus={self.gpus}: a node with GPUs says which kind and how many")
        if self.fallback and not self.spot:
            raise ValueError(f"fallback={self.fallback} needs spot=true: on-demand nodes are not taken away")
        return self

    @property
    def slots(self) -> int:
        """How much it has of its own resource: one for each GPU, or for each CPU when it has none."""
        return self.gpus or self.cpus
