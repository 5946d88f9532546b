"""CLIP without a mask, as Paris reads it: a pipeline's folder holds it, like diffusers' own pipelines."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from experts.conditions.text_embedding import TextEmbedding
from experts.conditions.text_files import TextError

ENCODER_FOLDER = "text_encoder"


@dataclass(frozen=True)
class UnmaskedTextEncoder:
    """CLIP as Paris reads it: all positions of the last layer, those of the padding too."""

    tokenizer: Any
    model: Any

    @classmethod
    def load(cls, folder: Path) -> "UnmaskedTextEncoder":
        """Load `tokenizer` and `text_encoder` of a folder; raise `TextError` if that fails."""
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: PLC0415 - seconds of imports

        try:
            tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            model = CLIPTextModel.from_pretrained(
                folder / ENCODER_FOLDER, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise TextError(f"{folder} has no CLIP in text_encoder and tokenizer: {error}") from error
        return cls(tokenizer, model.eval().requires_grad_(requires_grad=False))

    @classmethod
    def find(cls, folder: Path) -> "UnmaskedTextEncoder | None":
        """Load the encoder that a folder holds, None without one; raises like `load`."""
        return cls.load(folder) if (folder / ENCODER_FOLDER).is_dir() else None

    def save(self, folder: Path) -> None:
        """Write `tokenizer` and `text_encoder` into a folder."""
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.model.save_pretrained(folder / ENCODER_FOLDER)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> TextEmbedding:
        """Return a row for each caption."""
        tokens = self.tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=self.model.config.max_position_embeddings,
            return_tensors="pt",
        ).input_ids
        sequence = self.model(tokens.to(self.model.device)).last_hidden_state.float().cpu()
        mask, is_null = torch.ones(tokens.shape, dtype=torch.bool), torch.zeros(len(captions), dtype=torch.bool)
        return TextEmbedding(sequence, mask, sequence.new_zeros(len(captions), 0), is_null)

    @cached_property
    def null_text(self) -> TextEmbedding:
        """Return the encoded "", one row."""
        return self.encode([""])
