"""Initial models: training starts from a checkpoint of any supported kind, or raises."""

import shutil

import diffusers
import pytest
import torch

from ddm_core.artifacts import Workspace, read_json
from experts.codecs.registry import fit_codec
from experts.conditions.condition import Condition
from experts.conditions.text_embedding import TextEmbedding
from experts.config import CodecConfig, DiTConfig, ExpertConfig, ResidualMLPConfig, TrainingConfig, UNetConfig
from experts.diffusion.noise_schedule import DDPM_LINEAR, NOISE_SCHEDULES
from experts.expert import Expert, expert_flops, train_expert
from experts.networks.model_io import save_model
from experts.networks.pretrained import build_initial_model
from experts.networks.pretrained_files import WEIGHTS, InitError, check_unchanged, init_checksum
from experts.networks.registry import build_network, call_network, load_network
from experts.training.latent_dataset import make_batch
from experts.training.latents.folder import read_latents
from experts.training.loss import converted_loss

SHAPE = (1, 4, 4)
KINDS = {
    "unet": UNetConfig(channels=(8, 8), attention=False),
    "dit": DiTConfig(patch_size=2, heads=1, head_width=8, depth=1),
    "residual_mlp": ResidualMLPConfig(width=8, depth=1),
}


def save_network(folder, kind="unet", shape=SHAPE, num_classes=3):
    model = build_network(KINDS[kind], shape, num_classes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_model(model, folder)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_bare_model_defaults_to_ddpm_noise_prediction(kind, tmp_path):
    model, noised = save_network(tmp_path, kind), torch.randn(2, *SHAPE)
    initial_model = build_initial_model(ExpertConfig(init=str(tmp_path)), SHAPE, 3)
    assert (initial_model.prediction, initial_model.noise_schedule) == ("noise", DDPM_LINEAR)
    inputs = (noised, torch.tensor([0.2, 0.9]), Condition(torch.tensor([1, -1])))
    assert torch.equal(call_network(initial_model.model.eval(), *inputs), call_network(model, *inputs))
    config = ExpertConfig(init=str(tmp_path), init_prediction="clean", init_noise_schedule="cosine", prediction="noise")
    initial_model = build_initial_model(config, SHAPE, 3)
    assert (initial_model.prediction, initial_model.noise_schedule.name) == ("clean", "cosine")


def test_expert_folder_provides_prediction_and_schedule(tmp_path):
    metadata = {
        "prediction": "clean",
        "noise_schedule": NOISE_SCHEDULES["cosine"],
        "latent_shape": SHAPE,
        "num_classes": 3,
    }
    Expert(model=save_network(tmp_path / "bare"), cluster_id=1, **metadata).save(tmp_path / "ours")
    initial_model = build_initial_model(ExpertConfig(init=str(tmp_path / "ours")), SHAPE, 3)
    assert (initial_model.prediction, initial_model.noise_schedule.name) == ("clean", "cosine")


def test_unconditional_diffusers_unet_is_accepted(tmp_path):
    model = diffusers.UNet2DModel(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=8,
        add_attention=False,
    )
    model.save_pretrained(tmp_path)
    initial_model = build_initial_model(ExpertConfig(init=str(tmp_path)), SHAPE, 0)
    assert call_network(initial_model.model, torch.zeros(2, *SHAPE), torch.rand(2), Condition.null(2)).shape == (
        2,
        *SHAPE,
    )


@pytest.mark.parametrize(
    ("shape", "num_classes", "message"),
    [
        ((1, 8, 8), 3, "has sample_size=4, and the data need sample_size=8; choose another codec"),
        ((8,), 3, r"the data need latents of shape \(8,\)"),
        (SHAPE, 0, "has num_class_embeds=4, and the data need num_class_embeds=1"),
    ],
)
def test_checkpoint_of_other_shape_or_classes_is_refused(shape, num_classes, message, tmp_path):
    save_network(tmp_path)
    with pytest.raises(InitError, match=message):
        build_initial_model(ExpertConfig(init=str(tmp_path)), shape, num_classes)


SIZES = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 4, "patch_size": 2}
VARIANCES = {
    "DiTTransformer2DModel": {"num_embeds_ada_norm": 3},
    "PixArtTransformer2DModel": {"caption_channels": 8, "cross_attention_dim": 16},
}


def make_text(tokens=5, width=8):
    shown = torch.arange(tokens)[None] < 2
    return TextEmbedding(torch.randn(1, tokens, width), shown, torch.randn(1, 6), torch.zeros(1, dtype=torch.bool))


@pytest.mark.parametrize("class_name", VARIANCES)
def test_learned_variance_is_dropped_exactly(class_name, tmp_path):
    settings = {**SIZES, **VARIANCES[class_name], "in_channels": 3, "out_channels": 6}
    original = getattr(diffusers, class_name)(**settings).eval()
    for parameter in original.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    original.save_pretrained(tmp_path / "published")
    null_text = make_text() if "PixArt" in class_name else None
    config = ExpertConfig(init=str(tmp_path / "published"))
    model = build_initial_model(config, (3, 4, 4), 0 if null_text else 3, null_text).model.eval()
    noised, t, condition = torch.randn(1, 3, 4, 4), torch.tensor([0.3]), Condition(torch.tensor([-1]), null_text)
    inputs = {"timestep": 1000 * t, "return_dict": False}
    if null_text is None:
        inputs |= {"class_labels": torch.tensor([3])}
    else:
        inputs |= {"encoder_hidden_states": null_text.sequence, "encoder_attention_mask": null_text.mask}
    expected = original(noised, **inputs)[0][:, :3]
    torch.testing.assert_close(call_network(model, noised, t, condition), expected, atol=1e-6, rtol=1e-6)
    save_model(model, tmp_path / "ours")
    assert_equal_parameters(load_network(tmp_path / "ours"), model)
    assert model.config.out_channels == 3


def test_a_checkpoint_of_text_needs_its_text_encoder(tmp_path):
    settings = {**SIZES, **VARIANCES["PixArtTransformer2DModel"], "in_channels": 1, "out_channels": 1}
    diffusers.PixArtTransformer2DModel(**settings).save_pretrained(tmp_path)
    config = ExpertConfig(init=str(tmp_path))
    with pytest.raises(InitError, match="has caption_channels=8, and the data need caption_channels=12"):
        build_initial_model(config, SHAPE, 0, make_text(width=12))
    with pytest.raises(InitError, match="takes texts of .* and the data have None"):
        build_initial_model(config, SHAPE, 0)
    with pytest.raises(InitError, match="reads text and no classes"):
        build_initial_model(config, SHAPE, 3, make_text())


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InitError, match=r"no config\.json$"):
        init_checksum(tmp_path / "nowhere")
    save_network(tmp_path / "pipeline" / "unet")
    with pytest.raises(InitError, match="it has the parts unet: name one of them"):
        init_checksum(tmp_path / "pipeline")


def test_pickle_is_refused_without_safetensors(tmp_path):
    save_network(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"")
    build_initial_model(ExpertConfig(init=str(tmp_path)), SHAPE, 3)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(InitError, match=r"pickles are not read; it has diffusion_pytorch_model\.bin: .* convert"):
        build_initial_model(ExpertConfig(init=str(tmp_path)), SHAPE, 3)


def test_only_links_of_hub_snapshots_are_followed(tmp_path):
    model, snapshot = save_network(tmp_path / "plain"), tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    shutil.copytree(tmp_path / "plain", tmp_path / "models--a--b" / "blobs")
    for file in (tmp_path / "plain").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    initial_model = build_initial_model(ExpertConfig(init=str(snapshot)), SHAPE, 3)
    assert_equal_parameters(initial_model.model, model)
    assert init_checksum(snapshot) == init_checksum(tmp_path / "plain")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "plain" / "config.json")
    with pytest.raises(InitError, match="is a link, which may point anywhere"):
        init_checksum(snapshot)


def assert_equal_parameters(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_checksum_depends_on_network_files_only(tmp_path):
    save_network(tmp_path / "a")
    before = init_checksum(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("words")
    (tmp_path / "a").rename(tmp_path / "b")
    assert init_checksum(tmp_path / "b") == before
    config = ExpertConfig(init=str(tmp_path / "b"), init_checksum=before)
    check_unchanged(config)
    save_network(tmp_path / "b")
    with pytest.raises(InitError, match="has changed since"):
        check_unchanged(config)


@pytest.mark.parametrize("init_loss", ["own", "converted"])
def test_training_resumes_from_checkpoint_with_its_prediction(init_loss, shards, tmp_path, workspace):
    fit_codec(CodecConfig(kind="pixels"), shards, tmp_path / "codec", workspace)
    training = TrainingConfig(steps=40, batch_size=20, warmup_steps=2, log_every=20, lr=3e-3)
    first = ExpertConfig(network=KINDS["residual_mlp"], prediction="noise", noise_schedule="cosine", training=training)
    train_expert(first, [shards], tmp_path / "codec", tmp_path / "first", workspace)
    second = ExpertConfig(training=training, init=str(tmp_path / "first"), init_loss=init_loss, prediction="clean")
    second_workspace = Workspace.at(tmp_path / "second_work")
    train_expert(second, [shards], tmp_path / "codec", tmp_path / "second", second_workspace)
    first_expert, second_expert = Expert.load(tmp_path / "first"), Expert.load(tmp_path / "second")
    assert (second_expert.prediction, second_expert.noise_schedule.name) == ("noise", "cosine")
    assert type(second_expert.model) is type(first_expert.model)
    assert expert_flops(second, SHAPE, 3) == expert_flops(first, SHAPE, 3)
    distance = sum(
        (a - b).abs().mean()
        for a, b in zip(second_expert.model.parameters(), first_expert.model.parameters(), strict=True)
    )
    assert 0 < distance < 1
    loss = read_json(tmp_path / "second" / "training.json")["final_loss"]
    model, dataset = first_expert.model, read_latents(second_workspace.scratch / "cache" / "latents")
    target = (
        ("noise", NOISE_SCHEDULES["cosine"]) if init_loss == "own" else ("clean", NOISE_SCHEDULES["rectified_flow"])
    )
    batches = [make_batch(dataset, training, step) for step in range(20, 40)]
    initial_loss = (
        sum(converted_loss(model, batch, ("noise", NOISE_SCHEDULES["cosine"]), target).item() for batch in batches) / 20
    )
    assert loss == pytest.approx(initial_loss, rel=0.3)
