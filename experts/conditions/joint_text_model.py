"""The text encoders of a pipeline of diffusers as one network: their sequences and pooled vectors make one text."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from experts.conditions.text_embedding import TextEmbedding
from experts.conditions.text_files import T5, JointLayout


class JointTextModel(nn.Module):
    """Tokenizers and networks of Stable Diffusion XL or 3, or of Flux; networks read the padding, as they do there."""

    def __init__(self, layout: JointLayout, load: Callable[[Path, str], tuple[Any, nn.Module]]) -> None:
        """Load every part by `load`, which maps (folder, class name) to a tokenizer and a network."""
        super().__init__()
        self.layout = layout
        parts = [load(part.folder, part.class_name) for part in layout.parts]
        self.tokenizers = [tokenizer for tokenizer, _ in parts]
        self.networks = nn.ModuleList(network for _, network in parts)

    @property
    def device(self) -> torch.device:
        """Return the device of the networks; diffusers' pipelines ask all components for it."""
        return next(self.networks.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the parameters."""
        return next(self.networks.parameters()).dtype

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Return the tokens of every caption; more than the length of a text if one of the tokenizers cuts it."""
        length, counts = self.layout.shape[0], [0] * len(captions)
        for tokenizer, part in zip(self.tokenizers, self.layout.parts, strict=True):
            for row, ids in enumerate(tokenizer(list(captions), verbose=False)["input_ids"]):
                counts[row] = max(counts[row], length + len(ids) - part.length)
        return counts

    def encode(self, texts: list[str]) -> tuple[Float[Tensor, "text token width"], Float[Tensor, "text pooled_width"]]:
        """Return the sequence of all tokens, those of the padding too, and the pooled vector of every text."""
        side_by_side, behind, pooled = [], [], []
        for part, tokenizer, network in zip(self.layout.parts, self.tokenizers, self.networks, strict=True):
            settings = {"padding": "max_length", "truncation": True, "max_length": part.length}
            ids = tokenizer(texts, **settings, return_tensors="pt").input_ids
            output = network(input_ids=ids.to(self.device), output_hidden_states=True)
            if part.class_name == T5:
                behind.append(output.last_hidden_state)
            elif part.width:
                side_by_side.append(output.hidden_states[-2])
            if part.pooled_width:
                pooled.append(output.pooler_output if "pooler_output" in output else output.text_embeds)
        joined = [torch.cat(side_by_side, -1), *behind] if side_by_side else behind
        width = self.layout.shape[1]
        padded = [nn.functional.pad(tokens, (0, width - tokens.shape[-1])) for tokens in joined]
        return torch.cat(padded, 1).float().cpu(), torch.cat(pooled, -1).float().cpu()

    def null_text(self) -> TextEmbedding | None:
        """Return the null text that the pipeline prescribes, one row of zeros; None is the encoded \"\"."""
        return TextEmbedding.zeros(*self.layout.shape) if self.layout.has_zero_null else None
