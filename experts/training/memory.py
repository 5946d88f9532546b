"""Peak memory of a training step, from a forward and a backward pass on the meta device: nothing is allocated."""

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

from experts.config import TrainingConfig
from experts.training.flops import FUSED_ATTENTION, count_parameters
from experts.training.optimizers.registry import OPTIMIZERS

FLOAT_BYTES = 4


def peak_training_bytes(network: nn.Module, call: Callable[[], Tensor], training: TrainingConfig) -> int:
    """Return the peak bytes of training steps in float32: parameters, gradients, optimizer, average and activations.

    What `training.offload` names is not counted. `network` and the inputs of `call`, of `part_rows(training)` rows, are
    on the meta device. Attention counts as a fused kernel.
    """
    live = LiveBytes(network.parameters())
    with live, FusedAttention():
        for _ in range(min(2, training.accumulate)):  # from the second part on, gradients exist before
            torch.autograd.backward(call().square().mean())
    network.zero_grad(set_to_none=True)
    return kept_bytes(network, training, training.offload) + live.peak


def part_rows(training: TrainingConfig) -> int:
    """Return the rows of the largest part of a batch."""
    return -(-training.batch_size // training.accumulate)


def kept_bytes(network: nn.Module, training: TrainingConfig, left_out: Collection[str] = ()) -> int:
    """Return the bytes that a training keeps besides the parameters: the optimizer's state, and the average.

    `left_out` names what is not counted, as `training.offload` does.
    """
    counts = {"optimizer": OPTIMIZERS[training.optimizer].count_values(network), "average": count_parameters(network)}
    return FLOAT_BYTES * sum(count for name, count in counts.items() if name not in left_out)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of the tensors that are alive while the block lasts; `peak` is their largest sum.

    What an operator allocates and frees inside itself is not counted.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """Count `tensors`, which exist already, from the start."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the operator, and count the memory of its results."""
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._add(value)
        return result

    def _add(self, tensor: Tensor) -> None:
        # The layouts of oneDNN have no storage.
        is_opaque = tensor.layout == torch._mkldnn  # type: ignore[attr-defined]
        owner = tensor if is_opaque else tensor.untyped_storage()
        key, size = owner._cdata, tensor.nbytes if is_opaque else tensor.untyped_storage().nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(owner, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class FusedAttention(TorchFunctionMode):
    """Counts attention on the meta device as a fused kernel, which keeps no matrix of all pairs of tokens."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call any function, with the fused operator of attention in place of the usual one."""
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        inputs = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
        return FUSED_ATTENTION(inputs["query"], inputs["key"], inputs["value"])[0]


checkpoint_fused = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), FusedAttention()))
"""torch's checkpointing of a function, whose second forward pass counts attention as fused too."""
