"""Text encoders of `transformers`: captions to rows of one fixed length, from a package, a folder or the Hub.

Only safetensors are read, and no code of a model is run. `transformers` is imported when an encoder is loaded.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ddm_core.artifacts import CorruptArtifact, read_json, write_json
from ddm_core.json_values import from_json
from experts.conditions.joint_text_model import JointTextModel
from experts.conditions.number_text import NumberText
from experts.conditions.text_embedding import TextEmbedding
from experts.conditions.text_files import TextError, encoder_checksum, find_encoder, find_tokenizer, read_layout
from experts.config import TextConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

SETTINGS = "text_encoder.json"
ROWS = 32
"""Captions that are encoded at a time."""

MODEL_CLASSES = {"minilm": "AutoModel", "clip": "CLIPTextModel", "t5": "T5EncoderModel", "transformers": "AutoModel"}


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer and a network; a caption has the same encoding alone and among others, as numbers of 16 bits."""

    config: TextConfig
    """With the checksum of the encoder's files."""
    tokenizer: Any
    """None for numbers, and for the encoders of a pipeline, whose model has one for each."""
    model: "PreTrainedModel | JointTextModel | NumberText"

    @classmethod
    def from_config(cls, config: TextConfig) -> "TextEncoder | None":
        """Load the encoder of a configuration, None for kind `none`.

        Raises `TextError` if a package or a file is missing, has changed since `config.checksum`, or is no encoder.
        """
        if config.kind == "none":
            return None
        if config.kind == "number":
            return cls(config, None, NumberText(config.length))
        folder = find_encoder(config)
        digest = encoder_checksum(config, folder)
        if config.checksum not in ("", digest):
            raise TextError(
                f"the text encoder in {folder} is not the one of the training, by the checksum of its files; restore "
                "the old files, or train again"
            )
        tokenizer, model = _load_parts(config, folder)
        return cls(replace(config, checksum=digest), tokenizer, model.eval().requires_grad_(False))

    @classmethod
    def load(cls, folder: Path) -> "TextEncoder | None":
        """Load the encoder that `save` named in a folder, None if it named none; raises like `from_config`."""
        config = read_text_config(folder)
        return None if config is None else cls.from_config(config)

    def save(self, folder: Path) -> None:
        """Write `text_encoder.json`: where the encoder is, its length, and the checksum of its files."""
        write_json(folder / SETTINGS, self.config)

    def to(self, device: torch.device | str) -> "TextEncoder":
        """Move the network to a device, in place."""
        self.model.to(device)
        return self

    def encode(self, captions: Sequence[str]) -> TextEmbedding:
        """Return a row for each caption, the null text for an empty one; log how many were too long and cut."""
        rows, num_cut = self.encode_and_count(captions)
        if num_cut:
            log.warning(
                "%d of %d texts are longer than the %d tokens of text.length, and were cut",
                *(num_cut, len(captions), self.config.length),
            )
        return rows

    def encode_and_count(self, captions: Sequence[str]) -> tuple[TextEmbedding, int]:
        """Return a row for each caption, on the CPU, and how many captions were cut to the length."""
        if not captions:
            return TextEmbedding.all_null(0, self.null_text), 0
        unique = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
        texts, index = list(unique), torch.tensor([unique[caption] for caption in captions])
        is_cut = torch.tensor([count > self.config.length for count in self.count_tokens(texts)])
        parts = [self.encode_padded(texts[start : start + ROWS]) for start in range(0, len(texts), ROWS)]
        rows = TextEmbedding.concatenate(parts).drop(torch.tensor([not text.strip() for text in texts]))
        return rows.rows(index), int(is_cut[index].sum())

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Return the number of tokens of every caption, before it is cut."""
        if not captions:
            return []
        if isinstance(self.model, JointTextModel | NumberText):
            return self.model.count_tokens(captions)
        return [len(ids) for ids in self.tokenizer(list(captions), verbose=False)["input_ids"]]

    @cached_property
    def null_text(self) -> TextEmbedding:
        """Return the encoded "", one row with at least one token; zeros where the encoders' pipeline says so."""
        if isinstance(self.model, JointTextModel | NumberText) and (zeros := self.model.null_text()) is not None:
            return zeros
        return replace(self.encode_padded([""]), is_null=torch.ones(1).bool())

    @torch.inference_mode()
    def encode_padded(self, texts: list[str]) -> TextEmbedding:
        """Return a row of the fixed length for each text, also for an empty one; cuts without a message."""
        if isinstance(self.model, JointTextModel | NumberText):
            sequence, pooled = self.model.encode(texts)
            mask = torch.ones(sequence.shape[:2], dtype=torch.bool)
        else:
            sequence, mask, pooled = self._encode_alone(texts)
        is_null = torch.zeros(len(texts), dtype=torch.bool)
        # Rounded as they are stored for training, so that a prompt is encoded as its caption was.
        return TextEmbedding(sequence.half().float().clone(), mask, pooled.half().float().clone(), is_null)

    def _encode_alone(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return sequence, mask and pooled vector of one network."""
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.config.length, return_tensors="pt"
        )
        mask, is_clip = tokens["attention_mask"].bool(), self.config.kind == "clip"
        mask[:, 0] |= ~mask.any(1)
        device = self.model.device
        attention_mask = None if is_clip else mask.long().to(device)
        output = self.model(input_ids=tokens["input_ids"].to(device), attention_mask=attention_mask)
        if is_clip:  # Stable Diffusion attends to the padding of CLIP, which is encoded like a token
            mask = torch.ones_like(mask)
        sequence = output.last_hidden_state.float().cpu() * mask[:, :, None]
        pooled = output.pooler_output.float().cpu() if is_clip else sequence.sum(1) / mask.sum(1, keepdim=True)
        return sequence, mask, pooled


def read_text_config(folder: Path) -> TextConfig | None:
    """Read the `text_encoder.json` of a folder, None without; raise `CorruptArtifact` if it is invalid."""
    if not (folder / SETTINGS).is_file():
        return None
    try:
        return from_json(TextConfig, read_json(folder / SETTINGS))
    except ValueError as error:
        raise CorruptArtifact(f"{folder / SETTINGS} does not describe a text encoder: {error}") from error


def _load_parts(config: TextConfig, folder: Path) -> tuple[Any, "PreTrainedModel | JointTextModel"]:
    """Load tokenizer and network from a folder; raises `TextError`."""
    if config.kind == "diffusers":
        return None, JointTextModel(read_layout(config, folder), _load_part)
    tokenizer, encoder = _load_part(folder, MODEL_CLASSES[config.kind])
    longest = getattr(encoder.config, "max_position_embeddings", None) or config.length
    if config.length > longest:
        raise TextError(f"text.length must be at most {longest}, the positions of {folder}; got {config.length}")
    return tokenizer, encoder


def _load_part(folder: Path, class_name: str) -> tuple[Any, "PreTrainedModel"]:
    """Load a tokenizer and a network of this class; raises `TextError`."""
    try:
        import transformers
    except ImportError as error:
        raise TextError(
            "text needs the package transformers; pip install 'decentralized-diffusion[text]', or set text=none"
        ) from error
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(find_tokenizer(folder), local_files_only=True)
        model, loaded = getattr(transformers, class_name).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
        if missing := sorted(key for key in loaded["missing_keys"] if not key.startswith("pooler.")):
            raise ValueError(f"its weights lack {', '.join(missing)}")
    except (OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise TextError(f"{folder} does not hold a text encoder of class {class_name}: {reason}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    encoder: PreTrainedModel = model.get_encoder() if model.config.is_encoder_decoder else model
    return tokenizer, encoder
