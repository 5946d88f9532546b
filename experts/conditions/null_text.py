"""The null text of a network: its own encoding of "", kept as buffers beside its parameters and in a file of its own.

The buffers are not part of the state dict, so that the weights stay those of the plain diffusers model.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ddm_core.artifacts import CorruptArtifact
from experts.conditions.text_embedding import TextEmbedding

NULL_TEXT_FILE = "null_text.safetensors"
_FIELDS = ("sequence", "mask", "pooled")


def set_null_text(model: nn.Module, null_text: TextEmbedding | None) -> nn.Module:
    """Give a network its null text, one row, in place, and return it; None leaves a network without text."""
    if null_text is not None:
        for field in _FIELDS:
            value = getattr(null_text, field).detach().clone()
            model.register_buffer(f"null_text_{field}", value, persistent=False)
    return model


def get_null_text(model: nn.Module) -> TextEmbedding | None:
    """Return a network's null text as one row, or None for a network without text."""
    sequence = getattr(model, "null_text_sequence", None)
    if sequence is None:
        return None
    is_null = torch.ones(1, dtype=torch.bool, device=sequence.device)
    return TextEmbedding(sequence, model.get_buffer("null_text_mask"), model.get_buffer("null_text_pooled"), is_null)


def save_null_text(model: nn.Module, folder: Path) -> None:
    """Write a network's null text into its folder, if it has one."""
    null_text = get_null_text(model)
    if null_text is not None:
        save_file({field: getattr(null_text, field).contiguous() for field in _FIELDS}, folder / NULL_TEXT_FILE)


def load_null_text(folder: Path) -> TextEmbedding | None:
    """Read the null text of a network's folder, None if it has none; raise `CorruptArtifact` for an invalid file."""
    path = folder / NULL_TEXT_FILE
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
        sequence, mask, pooled = (tensors[field].clone() for field in _FIELDS)
    except (SafetensorError, KeyError, OSError) as error:
        raise CorruptArtifact(f"{path} is not a null text ({error}); copy it again, or train again") from error
    is_one_row = sequence.ndim == 3 and sequence.shape[:2] == mask.shape and len(sequence) == len(pooled) == 1
    if not is_one_row or pooled.ndim != 2 or mask.dtype != torch.bool:
        raise CorruptArtifact(f"{path} does not hold one row of a text; copy it again, or train again")
    return TextEmbedding(sequence, mask, pooled, torch.ones(1, dtype=torch.bool))
