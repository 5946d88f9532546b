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
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from ddm_core.artifacts import write_json

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


def save_tiny_encoder(folder: Path, kind: str, seed: int = 0) -> Path:
    """Write a tokenizer of words and a random encoder of one or two layers."""
    save_tiny_tokenizer(folder)
    size = {"vocab_size": 4 + len(WORDS), "num_attention_heads": 2, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind.startswith("clip"):
            layers = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "projection_dim": 12}
            tokens = {"max_position_embeddings": 32, "bos_token_id": 2, "eos_token_id": 3}
            config = CLIPTextConfig(**size, **layers, **tokens)
            model = CLIPTextModel(config) if kind == "clip" else CLIPTextModelWithProjection(config)
        elif kind == "t5":
            model = T5EncoderModel(T5Config(vocab_size=size["vocab_size"], d_model=24, d_kv=4, d_ff=16, num_layers=1))
        else:
            layers = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16}
            model = BertModel(BertConfig(**size, **layers, max_position_embeddings=32))
    model.save_pretrained(folder)
    return folder


def save_tiny_tokenizer(folder: Path) -> None:
    """Write a tokenizer of words."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[BOS]", "[EOS]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)])
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


JOINT = {
    "StableDiffusionXLPipeline": ("clip", "clip_projection"),
    "StableDiffusion3Pipeline": ("clip_projection", "clip_projection", "t5"),
    "FluxPipeline": ("clip", "t5"),
}
"""Kinds of the text encoders of a pipeline, by its class."""


def save_tiny_pipeline(folder: Path, class_name: str) -> Path:
    """Write the text encoders of a pipeline of diffusers, without its other parts."""
    for number, kind in enumerate(JOINT[class_name], start=1):
        save_tiny_encoder(folder / f"text_encoder{'' if number == 1 else f'_{number}'}", kind, seed=number)
    index = {"_class_name": class_name, "force_zeros_for_empty_prompt": class_name == "StableDiffusionXLPipeline"}
    write_json(folder / "model_index.json", index)
    return folder
