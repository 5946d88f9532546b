"""Text encoders: fixed length, the null text, rows alone and in a batch, cut prompts, and folders that are none."""

import json
import logging
import shutil

import diffusers
import pytest
import torch

from experts.conditions.condition import Condition
from experts.conditions.text_encoder import ROWS, TextEncoder
from experts.conditions.text_files import TextError, read_text_shape
from experts.config import DiffusersConfig, TextConfig
from experts.networks.registry import build_network, call_network
from experts.training.latents.caption_costs import caption_flops
from tests.text_encoders import JOINT, save_tiny_encoder, save_tiny_pipeline

CAPTIONS = ["a dark ankle boot", "", "a shirt", "a dark ankle boot", "one two three four five six seven eight"]


@pytest.fixture(scope="module")
def minilm():
    return TextEncoder.from_config(TextConfig(kind="minilm", length=8))


@pytest.fixture(scope="module", params=["clip", "t5", "transformers"])
def tiny(request, tmp_path_factory):
    folder = save_tiny_encoder(tmp_path_factory.mktemp(request.param), request.param)
    return TextEncoder.from_config(TextConfig(kind=request.param, path=str(folder), length=8))


def check_encoder(encoder):
    captions = [*CAPTIONS, *(f"boot number {number}" for number in range(ROWS))]
    rows, num_cut = encoder.encode_and_count(captions)
    assert rows.shape == encoder.null_text.shape and rows.shape[0] == 8
    assert num_cut == 1
    assert rows.is_null.tolist() == [not caption for caption in captions]
    assert (rows.sequence[~rows.mask] == 0).all()
    for row in (0, 2, 4, len(captions) - 1):
        alone = encoder.encode([captions[row]])
        torch.testing.assert_close(alone.sequence, rows.sequence[row : row + 1], rtol=2e-3, atol=1e-3)
        torch.testing.assert_close(alone.pooled, rows.pooled[row : row + 1], rtol=2e-3, atol=1e-3)
        assert torch.equal(alone.mask, rows.mask[row : row + 1])
    assert torch.equal(rows.pooled[0], rows.pooled[3]) and not torch.equal(rows.pooled[0], rows.pooled[2])
    assert torch.equal(rows.pooled, rows.pooled.half().float())
    assert encoder.null_text.mask.any() and encoder.null_text.is_null.all()
    assert len(encoder.encode([])) == 0


def test_minilm_encodes_rows_of_one_length(minilm):
    check_encoder(minilm)


def test_any_encoder_encodes_rows_of_one_length(tiny):
    check_encoder(tiny)


def test_clip_and_unet_equal_stable_diffusions_own_pipeline(tmp_path):
    folder = save_tiny_encoder(tmp_path, "clip")
    encoder = TextEncoder.from_config(TextConfig(kind="clip", path=str(folder), length=32))
    settings = {"block_out_channels": [32, 64], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
    settings |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "layers_per_block": 1, "attention_head_dim": 8}
    torch.manual_seed(0)
    config = DiffusersConfig(class_name="UNet2DConditionModel", settings=settings)
    unet = build_network(config, (4, 8, 8), 0, encoder.null_text).eval()
    encoder.tokenizer.model_max_length = 32
    pipeline = diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=encoder.model,
        tokenizer=encoder.tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    prompts, latents = ["a dark ankle boot", "a shirt"], torch.randn(3, 4, 8, 8)
    theirs, negative = pipeline.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=True)
    text = encoder.encode([*prompts, ""])
    expected = torch.cat([theirs, negative[:1]])
    filled = Condition(torch.full((3,), -1), text).filled(encoder.null_text).text
    torch.testing.assert_close(filled.sequence, expected.half().float(), rtol=0, atol=1e-5)
    with torch.no_grad():
        ours = call_network(unet, latents, torch.full((3,), 0.4), Condition(torch.full((3,), -1), text))
        own = unet(latents, 400, encoder_hidden_states=expected.half().float(), return_dict=False)[0]
        unpadded = unet(latents, 400, expected.half().float()[:, :7], return_dict=False)[0]
    torch.testing.assert_close(ours, own, rtol=0, atol=1e-5)
    assert (own - unpadded).abs().max() > 1e-3, "padding is read"


TEXTS_OF_PIPELINES = {
    "StableDiffusionXLPipeline": ((32, 16, 12), {}),
    "StableDiffusion3Pipeline": ((42, 24, 24), {"max_sequence_length": 10}),
    "FluxPipeline": ((9, 24, 8), {"max_sequence_length": 9}),
}
"""Shapes of the texts, and arguments of diffusers."""


@pytest.mark.parametrize("name", JOINT)
def test_encoders_of_a_pipeline_make_the_texts_of_diffusers(name, tmp_path):
    shape, arguments = TEXTS_OF_PIPELINES[name]
    config = TextConfig(kind="diffusers", path=str(save_tiny_pipeline(tmp_path, name)), length=shape[0])
    encoder, prompts = TextEncoder.from_config(config), ["a dark ankle boot", "a shirt"]
    model = "unet" if name == "StableDiffusionXLPipeline" else "transformer"
    components = {"vae": None, model: None, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    for number, (tokenizer, network) in enumerate(zip(encoder.model.tokenizers, encoder.model.networks, strict=True)):
        suffix, tokenizer.model_max_length = f"_{number + 1}" if number else "", 32
        components |= {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": network}
    arguments |= {f"prompt_{number}": prompts for number in range(2, len(JOINT[name]) + 1)}
    theirs = getattr(diffusers, name)(**components).encode_prompt(prompt=prompts, device="cpu", **arguments)
    assert (encoder.model.device.type, encoder.model.dtype) == ("cpu", torch.float32)
    text = encoder.encode([*prompts, ""])
    assert text.shape == shape == read_text_shape(config)
    assert torch.equal(text.sequence[:2], theirs[0].half().float())
    assert torch.equal(text.pooled[:2], theirs[1 if name == "FluxPipeline" else 2].half().float())
    assert text.mask[:2].all() and text.is_null.tolist() == [False, False, True]
    assert encoder.null_text.sequence.any() != (name == "StableDiffusionXLPipeline"), "its null text is zeros"
    assert encoder.encode_and_count(["a shirt", " ".join(["boot"] * 40)])[1] == 1


@pytest.mark.parametrize(
    ("name", "length", "damage", "message"),
    [
        ("StableDiffusionXLPipeline", 33, "", "at most 32"),
        ("StableDiffusion3Pipeline", 32, "", "above 32, the tokens of CLIP before those of T5"),
        ("FluxPipeline", 9, "text_encoder_2", "for a single encoder take text=clip"),
        ("StableDiffusion3Pipeline", 42, "text_encoder", "those that go together are Stable Diffusion XL"),
        ("FluxPipeline", 9, "text_encoder/tokenizer.json", "has no tokenizer"),
    ],
)
def test_pipeline_whose_encoders_do_not_fit_is_one_error(tmp_path, name, length, damage, message):
    path = save_tiny_pipeline(tmp_path, name) / damage
    if path.is_file():
        without_tokenizer(path.parent)
    elif damage:
        shutil.rmtree(path)
    with pytest.raises(TextError, match=message):
        TextEncoder.from_config(TextConfig(kind="diffusers", path=str(tmp_path), length=length))


def test_flops_of_a_caption_are_those_of_its_padded_length(tmp_path):
    folder, length, width = save_tiny_encoder(tmp_path, "transformers"), 8, 8
    encoder = TextEncoder.from_config(TextConfig(kind="transformers", path=str(folder), length=length))
    projections, hidden, attention = 4 * 2 * width**2, 2 * 2 * width * 16, 2 * 2 * length * width
    assert (
        caption_flops(encoder) == length * (projections + hidden + attention) + 2 * width**2
    )  # the last is a pooler's


def test_minilm_knows_what_is_alike(minilm):
    boot, shoe, dog = minilm.encode(["a dark ankle boot", "a black shoe", "the dog barks"]).pooled
    assert torch.cosine_similarity(boot, shoe, 0) > torch.cosine_similarity(boot, dog, 0) + 0.2


def test_long_texts_are_cut_with_one_message(minilm, caplog):
    with caplog.at_level(logging.WARNING):
        minilm.encode([CAPTIONS[4], "short", CAPTIONS[4]])
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 3 texts are longer than the 8 tokens of text.length, and were cut"
    ]


def test_saved_encoder_is_found_again(minilm, tmp_path):
    assert TextEncoder.load(tmp_path) is None
    minilm.save(tmp_path)
    loaded = TextEncoder.load(tmp_path)
    assert loaded.config == minilm.config and loaded.config.checksum
    assert torch.equal(loaded.encode(CAPTIONS).sequence, minilm.encode(CAPTIONS).sequence)


def test_changed_encoder_is_refused(tmp_path):
    folder = save_tiny_encoder(tmp_path / "encoder", "transformers")
    TextEncoder.from_config(TextConfig(kind="transformers", path=str(folder))).save(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.1}))
    with pytest.raises(TextError, match="not the one of the training"):
        TextEncoder.load(tmp_path)


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def with_pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def with_remote_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('executed')")


def with_truncated_weights(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_tokenizer, "has no tokenizer"),
        (with_pickle_only, "pickles are never read; it has .*pytorch_model.bin"),
        (with_remote_code, "does not hold a text encoder of class AutoModel"),
        (with_truncated_weights, "does not hold a text encoder"),
        (shutil.rmtree, "must be a folder with a text encoder"),
    ],
)
def test_folder_that_is_no_encoder_is_one_error(tmp_path, damage, message):
    folder = save_tiny_encoder(tmp_path / "encoder", "transformers")
    damage(folder)
    with pytest.raises(TextError, match=message):
        TextEncoder.from_config(TextConfig(kind="transformers", path=str(folder)))


def test_encoder_of_another_kind_is_refused(tmp_path):
    folder = save_tiny_encoder(tmp_path / "encoder", "t5")
    with pytest.raises(TextError, match="its weights lack"):
        TextEncoder.from_config(TextConfig(kind="clip", path=str(folder)))


def test_length_beyond_the_positions_is_refused(tmp_path):
    folder = save_tiny_encoder(tmp_path / "encoder", "clip")
    with pytest.raises(TextError, match="at most 32"):
        TextEncoder.from_config(TextConfig(kind="clip", path=str(folder), length=33))


def test_hub_that_cannot_be_reached_is_one_error(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(TextError, match="neither a folder nor a repository"):
        TextEncoder.from_config(TextConfig(kind="t5", path="someone/no-such-encoder"))


def test_only_minilm_needs_no_path():
    with pytest.raises(ValueError, match=r"needs text\.path"):
        TextConfig(kind="t5")
    assert TextEncoder.from_config(TextConfig()) is None
