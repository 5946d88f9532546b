"""Sharded training: every worker keeps its part of each parameter, of its gradient, moments and averages (FSDP2).

A whole parameter exists for as long as its block is computed. Checkpoints do not depend on the number of workers: the
tensors are put together one after the other.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from experts.training.parallel.distributed import DataParallelGroup

CALLED_ALONE = {"DiTTransformer2DModel": "transformer_blocks.0.norm1.emb"}
"""The module of a block that a class calls without the block."""


def shard_network(model: nn.Module, group: DataParallelGroup) -> None:
    """Divide the parameters among the workers, in place: those of every block of a list, and the rest."""
    mesh = init_device_mesh(next(model.parameters()).device.type, (group.size,))
    # The root is divided again after its forward pass too: averaged parameters that were measured must not stay.
    alone = CALLED_ALONE.get(type(model).__name__)
    inner = [] if alone is None else [model.get_submodule(alone)]
    for module in [*inner, *_find_blocks(model), model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _find_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members with parameters of the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from _find_blocks(child)


def copy_without_parameters(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters are on the meta device, and whose buffers are on the CPU."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    memo |= {id(buffer): buffer.detach().cpu().clone() for buffer in model.buffers()}
    return deepcopy(model, memo)


def own_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this worker keeps, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor put together from the parts of all workers; all of them must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def each_whole(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors one after the other, put together, on the CPU; every worker must take all of them."""
    for name, tensor in tensors.items():
        yield name, whole(tensor.detach()).cpu()


def divide_like(tensor: Tensor, parameter: Tensor | None) -> Tensor:
    """Return this worker's part of a whole tensor, divided as a parameter of the same shape is."""
    if isinstance(parameter, DTensor) and parameter.shape == tensor.shape:
        tensor = tensor.to(parameter.device)
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor


def are_sharded(model: nn.Module) -> bool:
    """Return whether the parameters of a network are divided."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
