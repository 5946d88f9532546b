"""A file of safetensors that is written one tensor after the other, so that one of them is in memory at a time."""

import json
import struct
from collections.abc import Iterable, Mapping
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The format's name of each type."""

ALIGNMENT = 8
"""Divides the bytes before the first tensor."""


def write_tensors(path: Path, like: Mapping[str, Tensor], values: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors on the CPU, whose names, shapes and order are those of `like`; it is not read otherwise."""
    ends = [0, *accumulate(tensor.numel() * tensor.element_size() for tensor in like.values())]
    header = json.dumps(
        {
            name: {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
            for (name, tensor), offsets in zip(like.items(), pairwise(ends), strict=True)
        }
    ).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _, tensor in values:
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
