"""As many threads as a stage has CPUs, in torch and in every BLAS."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from threadpoolctl import ThreadpoolController


@contextlib.contextmanager
def limited_threads(cpus: int) -> Iterator[None]:
    """One thread per CPU that was given; results depend on this number."""
    before = torch.get_num_threads()
    torch.set_num_threads(cpus)
    with _pools().limit(limits=cpus):
        try:
            yield
        finally:
            torch.set_num_threads(before)


@functools.cache
def _pools() -> ThreadpoolController:
    """The pools of all libraries that are loaded by the first stage; looking for them takes a millisecond."""
    return ThreadpoolController()
