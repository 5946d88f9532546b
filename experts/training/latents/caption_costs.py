"""Count the captions of latents and the FLOPs of encoding them."""

from collections.abc import Sequence
from pathlib import Path

from ddm_core.json_values import from_json
from experts.conditions.text_encoder import TextEncoder
from experts.config import TextConfig
from experts.training.flops import forward_flops
from experts.training.latents.folder import has_latents, read_latents, read_record


def count_captions(folder: Path, *, as_text: bool) -> int:
    """Return the captions of latents that are encoded, or those that are kept as text."""
    captions = read_latents(folder).captions
    return len(captions.weight) if captions is not None and captions.are_texts == as_text else 0


def caption_flops(text: TextEncoder) -> float:
    """Return the FLOPs of encoding one caption, which each costs alike, since all have one length."""
    return forward_flops(lambda: text.encode_padded([""]))


def text_flops(folders: Sequence[Path]) -> float:
    """Return the FLOPs of encoding the captions that latents keep as text, which `encode_latents` does."""
    counts = {folder: count_captions(folder, as_text=True) for folder in folders if has_latents(folder)}
    folder = next((folder for folder, count in counts.items() if count), None)
    encoder = None if folder is None else TextEncoder.from_config(text_config(folder))
    return 0.0 if encoder is None else caption_flops(encoder) * sum(counts.values())


def text_config(folder: Path) -> TextConfig:
    """Return the configuration of the text encoder of latents."""
    return from_json(TextConfig, read_record(folder)["origin"]["text"])
