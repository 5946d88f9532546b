"""What cannot succeed is refused from counts alone, and the advice leads to a configuration that passes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ddm_core.artifacts import write_json
from experts.conditions.text_files import read_text_shape
from experts.config import TextConfig
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.errors import ConfigError
from orchestrator.planning.checks.check import DataCheck, check_run
from orchestrator.run.run_folder import RunFolder
from tests.text_encoders import save_tiny_encoder


def check(folder: Path, *overrides: str) -> None:
    config = parse_config(compose([*overrides, f"folder={folder}"]))
    check_run(config, RunFolder(folder))


def empty_images(root: Path, **counts: int) -> tuple[str, str]:
    """Write files that only their names make images: the check decodes nothing."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.png").touch()
    return "data=image_folder", f"data.path={root}"


@pytest.mark.parametrize("overrides", [(), ("experiment=demo",), ("experiment=digits",)])
def test_shipped_configurations_pass(tmp_path, overrides):
    check(tmp_path, *overrides)


def test_scores_may_ask_for_captions_without_classes(tmp_path):
    data = empty_images(tmp_path / "data", a=300, b=300)
    check(tmp_path / "run", *data, "data.labels=false", "text=minilm", "scores.conditional=true")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("expert=unet",), "UNet2DModel has none"),
        (("expert=dit", "expert.align_block=9"), "is past the 4 blocks of DiTTransformer2DModel"),
        (
            (
                "expert=dit",
                "expert.align_teacher=transformers",
                "expert.align_path={folder}",
            ),
            "has no config.json",
        ),
    ],
)
def test_alignment_that_cannot_be_is_refused(tmp_path, overrides, message):
    named = [part.format(folder=tmp_path) for part in overrides]
    with pytest.raises(ConfigError, match=re.escape(message)):
        check(tmp_path / "run", "experiment=digits", "codec=pixels", "expert.align_weight=0.5", *named)


def test_prompt_without_text_names_a_class(tmp_path):
    data = empty_images(tmp_path / "data", boot=300, shirt=300)
    check(tmp_path / "run", *data, "validation.prompts=[shirt,boot]")
    with pytest.raises(ConfigError, match=r"validation\.prompts has no class shoe, and .* known: boot, shirt"):
        check(tmp_path / "run", *data, "validation.prompts=[boot,shoe]")


@settings(max_examples=8, deadline=None)
@example(
    counts=(0, 35), experts=1, expert="residual_mlp", components=2, holdout=0.0625, codec="pca", patch_size=1
)  # the one image of class a would be held out
@given(
    counts=st.tuples(st.integers(0, 90), st.integers(0, 90)),
    experts=st.integers(1, 6),
    expert=st.sampled_from(["residual_mlp", "unet", "dit"]),
    components=st.integers(2, 200),
    holdout=st.floats(0.05, 0.3),
    codec=st.sampled_from(["pca", "patch_pca"]),
    patch_size=st.integers(1, 32),
)
def test_advice_passes(tmp_path_factory, counts, experts, expert, components, holdout, codec, patch_size):
    root = tmp_path_factory.mktemp("check")
    given = [*empty_images(root / "data", a=counts[0] + 1, b=counts[1]), f"expert={expert}"]
    given += [f"partition.num_experts={experts}", f"expert.training.batch_size={experts * 40}"]
    given += [f"codec.components={components}", f"data.holdout={holdout}"]
    given += [f"codec={codec}", f"codec.patch_size={patch_size}"]
    try:
        check(root / "run", *given)
    except ConfigError as error:
        if advice := re.search(r"^Add: (.+)$", str(error), flags=re.MULTILINE):
            check(root / "run", *given, *advice[1].split())


@pytest.mark.parametrize(
    ("counts", "overrides", "message"),
    [
        ({"a": 200, "b": 0}, (), "all images have one class, a"),
        ({"a": 300, "b": 300}, ("data.limit=100", "expert.training.batch_size=80"), "data.limit=100 ends before"),
        ({"a": 300}, (), "all images have one class, a"),
        ({"a": 300, ".": 3}, (), "3 of 303 have none"),
        ({"a": 60, "b": 60}, (), "need 16 held-out images"),
        ({"a": 300, "b": 300}, ("partition.num_experts=60",), "at most 27"),
        ({"a": 60, "b": 60}, ("data.holdout=0.3",), "batch_size=240 is 60 images a step"),
        ({"a": 300, "b": 300}, ("data.image_size=64", "data.channels=3"), "64x64x3 has 12288"),
        ({"a": 300, "b": 300}, ("codec=patch_pca", "codec.patch_size=5"), "patch_size=5 must divide"),
        ({"a": 300, "b": 300}, ("codec=patch_pca", "codec.latent_channels=50"), "has 48 principal components"),
        ({"a": 300, "b": 300}, ("partition=labels", "partition.num_experts=3"), "2 classes"),
        ({"a": 300, "b": 300}, ("data.labels=false", "scores.conditional=true"), "scores.conditional"),
    ],
)
def test_data_that_cannot_succeed_name_the_reason(tmp_path, counts, overrides, message):
    root = tmp_path / "data"
    root.mkdir()
    loose = counts.pop(".", 0)
    source = empty_images(root, **counts)
    for number in range(loose):
        (root / f"{number}.png").touch()
    with pytest.raises(ConfigError, match=re.escape(message)):
        check(tmp_path / "run", *source, *overrides)


def test_wrong_path_is_refused_without_a_run_folder(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        check(tmp_path / "run", "data=image_folder", f"data.path={tmp_path / 'nowhere'}")
    assert not (tmp_path / "run").exists()


def test_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match="file is a file"):
            check(folder)


def test_more_cpus_than_the_machine_has_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"compute.stages.expert needs 9 CPUs"):
        check(tmp_path, "compute.cpus=2", "compute.stages.expert.cpus=9")


def test_check_imports_neither_torch_nor_ray():
    code = (
        "import sys; from pathlib import Path; from orchestrator.planning.checks.check import *\n"
        "check_run(RunConfig(), RunFolder(Path('run')))\n"
        "print([name for name in ('torch', 'ray', 'sklearn') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("text=minilm", "expert=unet"), "reads classes and no text; choose another network, or set text=none"),
        (("text=t5", "text.path={folder}"), "it has no config.json"),
        (("text=t5", "text.path={folder}/encoder"), "has no tokenizer"),
    ],
)
def test_text_that_cannot_be_read_is_refused(tmp_path, overrides, message):
    encoder = save_tiny_encoder(tmp_path / "encoder", "t5")
    for path in encoder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ConfigError, match=message):
        check(tmp_path / "run", *(override.format(folder=tmp_path) for override in overrides))


def test_text_of_a_known_shape_passes(tmp_path):
    save_tiny_encoder(tmp_path / "encoder", "clip")
    check(tmp_path / "run", "text=clip", f"text.path={tmp_path / 'encoder'}", "text.length=9")
    assert read_text_shape(TextConfig(kind="clip", path=str(tmp_path / "encoder"), length=9)) == (9, 8, 8)
    assert read_text_shape(TextConfig(kind="minilm")) == (16, 384, 384)
    assert read_text_shape(TextConfig(kind="t5", path="google/t5-v1_1-xxl", length=120)) == (120, 4096, 4096)


OVERRIDES_OF_TEXT = (
    "data=fashion_captions",
    "data.labels=false",
    "text=minilm",
    "codec=patch_pca",
    "codec.patch_size=4",
    "expert=pixart_small",
)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"in_channels": 16, "out_channels": 16},
            "has in_channels=16, out_channels=16, .* need in_channels=12",
        ),
        (
            {"in_channels": 12, "out_channels": 24, "caption_channels": 768},
            "caption_channels=768.* need .*=384",
        ),
        ({"_class_name": "Flux2Transformer2DModel"}, "class 'Flux2Transformer2DModel'; known are"),
    ],
)
def test_checkpoint_that_cannot_fit_is_refused(tmp_path, settings, message):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    write_json(checkpoint / "config.json", {"_class_name": "PixArtTransformer2DModel", **settings})
    (checkpoint / "diffusion_pytorch_model.safetensors").touch()
    with pytest.raises(ConfigError, match=message):
        check(tmp_path / "run", *OVERRIDES_OF_TEXT, f"expert.init={checkpoint}")


def test_checkpoint_that_lacks_tensors_is_refused_before_a_run(tmp_path):
    size = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "cross_attention_dim": 32}
    model = PixArtTransformer2DModel(**size, in_channels=12, out_channels=24, sample_size=7, caption_channels=384)
    model.save_pretrained(tmp_path / "checkpoint")
    overrides = (*OVERRIDES_OF_TEXT, f"expert.init={tmp_path / 'checkpoint'}")
    check(tmp_path / "run", *overrides)
    path = tmp_path / "checkpoint" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["proj_out.bias"], tensors["scale_shift_table"]
    save_file(tensors | {"lora.weight": torch.zeros(2)}, path)
    with pytest.raises(ConfigError, match=r"has no proj_out.bias, scale_shift_table and has the unknown lora.weight"):
        check(tmp_path / "run", *overrides)


@pytest.mark.parametrize(
    ("expert", "advice"), [("pixart_small", {"text.classes": "false"}), ("residual_mlp_small", {})]
)
def test_classes_are_left_out_for_a_network_that_reads_text(expert, advice):
    words = ["data=fashion_captions", "text=minilm", "codec=patch_pca", "codec.patch_size=7"]
    data_check = DataCheck(parse_config(compose([*words, f"expert={expert}"])), None)
    data_check.run()
    assert data_check.advice == advice


CAPTIONED = ("data=fashion_captions", "text=minilm", "text.classes=false", "codec=patch_pca", "codec.patch_size=7")
SMALL_UNET = (*CAPTIONED, "expert=unet_text_small")
SMALL_SD3 = (*CAPTIONED, "expert=sd3_small")
SMALL_AURAFLOW = (
    *(*CAPTIONED, "expert=diffusers", "expert.network.class_name=AuraFlowTransformer2DModel"),
    *(f"expert.network.settings.{name}=1" for name in ("num_mmdit_layers", "num_single_dit_layers")),
    *("expert.network.settings.attention_head_dim=16", "expert.network.settings.num_attention_heads=1"),
    "expert.network.settings.caption_projection_dim=16",
)
SMALL_LUMINA = (
    *(*CAPTIONED, "expert=diffusers", "expert.network.class_name=Lumina2Transformer2DModel"),
    *(f"expert.network.settings.{name}=1" for name in ("num_layers", "num_refiner_layers", "num_kv_heads")),
    *("expert.network.settings.hidden_size=24", "expert.network.settings.num_attention_heads=1"),
    *("expert.network.settings.axes_dim_rope=[8,8,8]", "expert.network.settings.axes_lens=[32,16,16]"),
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((*SMALL_UNET, "expert.network.class_name=HunyuanDiT2DModel"), "must be one of .*got HunyuanDiT2DModel"),
        (("expert=diffusers",), "class_name must be one of ResidualMLP, UNet2DModel.*got none"),
        ((*SMALL_UNET, "expert.network.settings.norm_num_grops=8"), "did you mean norm_num_groups"),
        ((*SMALL_UNET, "expert.network.settings.norm_num_groups=0"), "cannot be built"),
        ((*SMALL_UNET, "expert.network.settings.attention_head_dim=0"), "cannot be built"),
        ((*SMALL_UNET, "expert.network.settings.block_out_channels=32"), "cannot be read"),
        ((*SMALL_UNET, "expert.network.settings.block_out_channels=[]"), "cannot be read"),
        ((*SMALL_UNET, "expert.network.settings.layers_per_block=-1"), "layers_per_block.*not be negative; got -1"),
        ((*SMALL_UNET, "expert.network.settings.encoder_hid_dim=7"), "expert.network: UNet2D.* cannot be called"),
        ((*SMALL_SD3, "expert.network.settings.patch_size=0"), "patches of side 1 or more; got 0"),
        ((*SMALL_SD3, "expert.network.settings.attention_head_dim=7"), "cannot be called"),
        ((*SMALL_SD3, "expert.network.settings.pos_embed_max_size=1"), "cannot be called"),
        ((*SMALL_AURAFLOW, "expert.network.settings.pos_embed_max_size=1"), "cannot be called: index"),
    ],
)
def test_settings_of_a_class_are_tried_before_a_run(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message) as refused:
        check(tmp_path, *overrides)
    assert "for 1 reason;" in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        (
            *SMALL_UNET,
            *(f"expert.network.settings.{value}" for value in ("norm_num_groups=8", "block_out_channels=[32,48]")),
        ),
        SMALL_AURAFLOW,
        SMALL_LUMINA,
    ],
)
def test_a_class_gets_settings_that_its_file_does_not_name(tmp_path, overrides):
    check(tmp_path, *overrides)


def test_an_alignment_needs_images_of_one_size(tmp_path):
    data = empty_images(tmp_path / "data", a=300, b=300)
    sizes = ("data.image_size=32", "data.aspect_buckets=[48x32]", "router=prior_table", "expert=pixart_small")
    overrides = ("codec=patch_pca", "expert.align_weight=0.5", "data.labels=false")
    with pytest.raises(ConfigError, match="decodes images of one size with codec=patch_pca"):
        check(tmp_path / "run", *data, *sizes, *overrides)
