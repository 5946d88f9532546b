"""Text encoders of a few kilobytes, as folders that `transformers` reads."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = (
    "a",
    "dark",
    "light",
    "ankle",
    "boot",
    "shirt",
    "number",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "eight",
)


def save_tiny_encoder(folder: Path, kind: str) -> Path:
    """Write a tokenizer of words and a random encoder of one layer."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[BOS]", "[EOS]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)])
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    size = {"vocab_size": len(vocabulary), "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "clip":
            layers = {"hidden_size": 8, "intermediate_size": 16, "max_position_embeddings": 32}
            model = CLIPTextModel(CLIPTextConfig(**size, **layers, bos_token_id=2, eos_token_id=3))
        elif kind == "t5":
            model = T5EncoderModel(T5Config(vocab_size=len(vocabulary), d_model=8, d_kv=4, d_ff=16, num_layers=1))
        else:
            model = BertModel(BertConfig(**size, hidden_size=8, intermediate_size=16, max_position_embeddings=32))
    model.save_pretrained(folder)
    return folder
