"""Data parallelism: workers that train one network inside one island, with the result of one worker.

Every worker takes its rows of the global batch, torch's DistributedDataParallel or FSDP2 averages the gradients, and
all stop at the same step; only rank 0 writes. To create a group, start a process group of torch.distributed in every
worker that carries CPU tensors (`gloo`, or `cpu:gloo,cuda:nccl`); all workers need the same scratch folder. Without a
process group, or with one worker, every method here does nothing. A group never spans islands.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ddm_core.artifacts import Preempted
from ddm_core.errors import DDMError

BatchT = TypeVar("BatchT")


class GroupError(DDMError, ValueError):
    """These workers cannot train together."""


class WorkerLost(DDMError):  # noqa: N818 - names the event
    """Another worker of the group is lost; training can resume from the checkpoint of rank 0."""


@dataclass(frozen=True, slots=True)
class DataParallelGroup:
    """The rank of this worker and the size of its group."""

    rank: int = 0
    """Counted from 0; rank 0 writes."""
    size: int = 1

    @classmethod
    def join(cls) -> "DataParallelGroup":
        """Return the torch.distributed process group of this process, or a group of one."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    @property
    def is_main(self) -> bool:
        """Return whether this worker writes."""
        return self.rank == 0

    def local_rows(self, batch_size: int) -> slice:
        """Return this worker's rows of a global batch; raise `GroupError` if the workers would not get equally many."""
        if batch_size % self.size:
            smaller = batch_size - batch_size % self.size
            raise GroupError(
                f"a batch of {batch_size} cannot be divided equally among {self.size} workers; "
                f"choose a batch of {smaller or self.size} or {smaller + self.size}, or another number of workers"
            )
        rows = batch_size // self.size
        return slice(self.rank * rows, (self.rank + 1) * rows) if self.size > 1 else slice(None)

    def wrap_model(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, BatchT], Tensor | dict[str, Tensor]],
        *,
        is_sharded: bool = False,
    ) -> Callable[[BatchT], Tensor | dict[str, Tensor]]:
        """Return the loss of this worker's rows; its backward pass averages the gradients over all workers.

        A sharded network does so by itself.
        """
        if self.size == 1 or is_sharded:
            return partial(loss, model)
        # Without `find_unused_parameters` DDP rearranges its buckets after the first backward pass. That changes the
        # order in which gradients of three or more workers are added, so a resumed training would differ in its last
        # bits.
        return DistributedDataParallel(_LossModule(model, loss), find_unused_parameters=True)

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean of every value over all workers, without waiting for the device."""
        if self.size == 1:
            return values
        stacked = torch.stack([value.detach().float() for value in values.values()])
        distributed.all_reduce(stacked)
        return dict(zip(values, (stacked / self.size).unbind(), strict=True))

    def any_rank(self, flag: bool) -> bool:  # noqa: FBT001 - the flag is the value
        """Return whether the flag is true on at least one worker; the result is equal on all of them."""
        if self.size == 1:
            return flag
        votes = torch.tensor([flag], dtype=torch.uint8)
        distributed.all_reduce(votes, distributed.ReduceOp.MAX)
        return bool(votes)

    def check_equal(self, step: int) -> None:
        """Raise `GroupError` unless all workers would resume from the same step."""
        if self.size == 1:
            return
        steps = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        distributed.all_gather(steps, torch.tensor([step]))
        resume_steps = [int(other) for other in steps]
        if len(set(resume_steps)) > 1:
            raise GroupError(
                "all workers need the same scratch folder; they read checkpoints of the steps "
                f"{', '.join(map(str, resume_steps))}; put the folder on a shared disk, or all workers on one node"
            )

    def run_on_main(self, work: Callable[[], None]) -> None:
        """Run `work` on rank 0 while the other ranks wait; they raise `Preempted` if it fails."""
        if self.size == 1:
            work()
            return
        is_done = not self.is_main
        with self.worker_loss_as_error():
            try:
                if self.is_main:
                    work()
                    is_done = True
            finally:
                has_failed = self.any_rank(not is_done)
            if has_failed:
                raise Preempted("rank 0 of the group stopped; read its log for the reason")

    @contextlib.contextmanager
    def worker_loss_as_error(self) -> Iterator[None]:
        """Raise `WorkerLost` for the connection errors of a lost worker."""
        try:
            yield
        except RuntimeError as error:  # gloo raises no class of its own
            if self.size > 1 and (isinstance(error, distributed.DistError) or "gloo" in str(error)):
                reason = str(error).partition(". ")[0]
                raise WorkerLost(f"another of the {self.size} workers is lost ({reason})") from error
            raise


def defer_sync(
    compute_loss: Callable[[BatchT], Tensor | dict[str, Tensor]], *, defer: bool
) -> contextlib.AbstractContextManager[None]:
    """Return a context of forward passes whose gradients are added up, not averaged over the workers, if `defer`."""
    if defer and isinstance(compute_loss, DistributedDataParallel):
        return compute_loss.no_sync()
    return contextlib.nullcontext()


class _LossModule(nn.Module, Generic[BatchT]):
    """The loss as a module, which DistributedDataParallel can wrap without changing the network."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, BatchT], Tensor | dict[str, Tensor]]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: BatchT) -> Tensor | dict[str, Tensor]:
        return self.loss(self.model, batch)
