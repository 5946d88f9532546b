"""Workers that train one network together inside one island, as one worker would with the same global batch.

Every worker takes its rows of the global batch, torch's DistributedDataParallel averages the gradients, and all of
them stop at the same step; the first one alone writes. Whoever wants a group starts a process group of
torch.distributed that carries CPU tensors (`gloo`, or `cpu:gloo,cuda:nccl`) in every worker, all of which see the same
scratch folder. Without one, or with one worker, everything here does nothing. A group never reaches across islands.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ddm_core.artifacts import Preempted

Rows = TypeVar("Rows")


class GroupError(ValueError):
    """These workers cannot train together."""


class WorkerLost(Exception):  # noqa: N818 - names what happened
    """Another worker of the group is gone; what the first one has saved can be continued."""


@dataclass(frozen=True, slots=True)
class DataParallelGroup:
    """This worker's place among those that train together."""

    rank: int = 0
    """Counted from 0; the first one writes."""
    size: int = 1

    @classmethod
    def join(cls) -> "DataParallelGroup":
        """The process group of torch.distributed that this process has joined, or a group of one."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether this worker is the one that writes."""
        return self.rank == 0

    def local_rows(self, batch_size: int) -> slice:
        """This worker's rows of a global batch; `GroupError` if the workers would not get equally many."""
        if batch_size % self.size:
            below = batch_size - batch_size % self.size
            raise GroupError(
                f"a batch of {batch_size} cannot be shared equally by {self.size} workers; "
                f"take a batch of {below or self.size} or {below + self.size}, or another number of workers"
            )
        rows = batch_size // self.size
        return slice(self.rank * rows, (self.rank + 1) * rows) if self.size > 1 else slice(None)

    def wrap_model(
        self, model: nn.Module, loss: Callable[[nn.Module, Rows], dict[str, Tensor]]
    ) -> Callable[[Rows], dict[str, Tensor]]:
        """The loss of this worker's rows, whose backward pass gives every worker the mean gradient of all."""
        if self.size == 1:
            return lambda batch: loss(model, batch)
        # DDP otherwise rearranges its buckets after the first backward pass, and so the order in which three or more
        # workers' gradients are added: a training that was continued would differ in its last bits.
        return DistributedDataParallel(_LossOf(model, loss), find_unused_parameters=True)

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean of every value over all workers; nothing waits for the device."""
        if self.size == 1:
            return values
        stacked = torch.stack([value.detach().float() for value in values.values()])
        distributed.all_reduce(stacked)
        return dict(zip(values, (stacked / self.size).unbind(), strict=True))

    def any_rank(self, said: bool) -> bool:  # noqa: FBT001 - what this worker says is the value
        """Whether at least one worker says yes; all of them get the same answer."""
        if self.size == 1:
            return said
        votes = torch.tensor([said], dtype=torch.uint8)
        distributed.all_reduce(votes, distributed.ReduceOp.MAX)
        return bool(votes)

    def check_equal(self, step: int) -> None:
        """Raise `GroupError` unless all workers would go on from the same step."""
        if self.size == 1:
            return
        steps = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        distributed.all_gather(steps, torch.tensor([step]))
        found = [int(other) for other in steps]
        if len(set(found)) > 1:
            raise GroupError(
                f"the workers found checkpoints of the steps {', '.join(map(str, found))}: they do not see the same "
                "scratch folder; put it on a disk that all of them share, or all workers on one node"
            )

    def run_on_main(self, work: Callable[[], None]) -> None:
        """Let the first worker do what all need; the others wait, and raise `Preempted` if it does not end well."""
        if self.size == 1:
            work()
            return
        done = not self.is_main
        with self.worker_loss_as_error():
            try:
                if self.is_main:
                    work()
                    done = True
            finally:
                is_missing = self.any_rank(not done)
            if is_missing:
                raise Preempted("the first worker of the group stopped, and says why")

    @contextlib.contextmanager
    def worker_loss_as_error(self) -> Iterator[None]:
        """Turn the errors of a connection to a worker that is gone into `GroupBroken`."""
        try:
            yield
        except RuntimeError as error:  # gloo raises no class of its own
            if self.size > 1 and (isinstance(error, distributed.DistError) or "gloo" in str(error)):
                reason = str(error).partition(". ")[0]
                raise WorkerLost(f"another of the {self.size} workers is gone ({reason})") from error
            raise


class _LossOf(nn.Module, Generic[Rows]):
    """The loss as a module, which is what DistributedDataParallel wraps; the network inside stays as it is."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Rows], dict[str, Tensor]]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Rows) -> dict[str, Tensor]:
        return self.loss(self.model, batch)
