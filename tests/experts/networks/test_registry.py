import diffusers
import pytest
import torch

from ddm_core.artifacts import CorruptArtifact, write_json
from experts.conditions.condition import Condition
from experts.config import DiTConfig, ResidualMLPConfig, UNetConfig
from experts.networks.class_settings import NetworkError
from experts.networks.model_io import save_model
from experts.networks.registry import build_network, call_network, load_network

TINY = {
    "residual_mlp": (ResidualMLPConfig(width=16, depth=2), (6,)),
    "residual_mlp_skip": (ResidualMLPConfig(width=16, depth=2, input_skip=True), (6,)),
    "unet": (UNetConfig(channels=(8, 16)), (1, 8, 8)),
    "unet_equal": (UNetConfig(channels=(8, 8)), (1, 8, 8)),
    "dit": (DiTConfig(patch_size=2, heads=2, head_width=8, depth=2), (2, 8, 8)),
}


def build_with_inputs(kind, num_classes=3):
    """Return a network without zero-initialized layers, so that every input matters, and inputs."""
    torch.manual_seed(0)
    config, shape = TINY[kind]
    model = build_network(config, shape, num_classes)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model, torch.randn(4, *shape), torch.tensor([0.1, 0.4, 0.6, 0.9])


@pytest.mark.parametrize("kind", TINY)
def test_loaded_network_equals_saved_network(kind, tmp_path):
    model, noised, t = build_with_inputs(kind)
    condition = Condition(torch.tensor([0, 1, 2, -1]))
    save_model(model, tmp_path)
    loaded = load_network(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    model.eval()
    assert torch.equal(call_network(loaded, noised, t, condition), call_network(model, noised, t, condition))
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".json", ".safetensors"]


@pytest.mark.parametrize(("kind", "name"), [("unet", "UNet2DModel"), ("dit", "DiTTransformer2DModel")])
def test_diffusers_loads_a_saved_network(kind, name, tmp_path):
    model, noised, t = build_with_inputs(kind)
    save_model(model, tmp_path)
    reference = getattr(diffusers, name).from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    labels = torch.tensor([0, 1, 2, 3])
    expected = reference(noised, t * 1000, labels, return_dict=False)[0]
    predicted = call_network(model.eval(), noised, t, Condition(torch.tensor([0, 1, 2, -1])))
    assert torch.equal(predicted, expected)


@pytest.mark.parametrize("kind", TINY)
def test_saving_twice_is_byte_identical(kind, tmp_path):
    model, _, _ = build_with_inputs(kind)
    for name in ("a", "b"):
        save_model(model, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize("kind", TINY)
def test_output_depends_on_t_class_and_null(kind):
    model, noised, t = build_with_inputs(kind)
    model.eval()
    base = call_network(model, noised, t, Condition(torch.zeros(4, dtype=torch.int64)))
    assert base.shape == noised.shape
    assert not torch.allclose(base, call_network(model, noised, 1 - t, Condition(torch.zeros(4, dtype=torch.int64))))
    for other in (Condition.null(4), Condition(torch.ones(4, dtype=torch.int64))):
        assert not torch.allclose(base, call_network(model, noised, t, other))


@pytest.mark.parametrize("kind", TINY)
def test_networks_never_drop_labels(kind, tmp_path):
    model, noised, t = build_with_inputs(kind)
    save_model(model, tmp_path)
    condition = Condition(torch.tensor([0, 1, 2, 1]))
    for network in (model, load_network(tmp_path)):
        calls = [call_network(network.train(), noised, t, condition) for _ in range(30)]
        assert all(torch.equal(calls[0], call) for call in calls)


@pytest.mark.parametrize("kind", TINY)
def test_unconditional_networks_accept_null(kind):
    model, noised, t = build_with_inputs(kind, num_classes=0)
    assert call_network(model, noised, t, Condition.null(4)).isfinite().all()


@pytest.mark.parametrize("kind", TINY)
def test_scalar_t_applies_to_all_rows(kind):
    model, noised, _ = build_with_inputs(kind)
    condition = Condition.null(4)
    broadcast = call_network(model.eval(), noised, torch.tensor(0.3), condition)
    assert torch.equal(broadcast, call_network(model, noised, torch.full((4,), 0.3), condition))


def test_residual_mlp_starts_at_zero_for_any_shape():
    model = build_network(ResidualMLPConfig(width=8, depth=1), (2, 3, 5), 0)
    predicted = call_network(model, torch.randn(4, 2, 3, 5), torch.rand(4), Condition.null(4))
    assert torch.equal(predicted, torch.zeros(4, 2, 3, 5))


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (UNetConfig(), (96,), "residual_mlp"),
        (DiTConfig(), (96,), "residual_mlp"),
        (DiTConfig(), (1, 8, 12), "side, side"),
        (UNetConfig(channels=(8, 8, 8)), (1, 14, 14), "at most 2 entries"),
        (UNetConfig(channels=(8, 12)), (1, 8, 8), "multiple of 8"),
        (DiTConfig(patch_size=3), (1, 28, 28), "does not divide 28"),
    ],
)
def test_unsupported_latents_raise_with_a_remedy(config, shape, message):
    with pytest.raises(NetworkError, match=message):
        build_network(config, shape, 0)


def test_t_within_a_sample_is_refused():
    model, noised, _ = build_with_inputs("residual_mlp")
    with pytest.raises(NetworkError, match="one t a row"):
        call_network(model, noised, torch.rand(4, 6), Condition.null(4))


def test_unknown_model_class_is_refused(tmp_path):
    write_json(tmp_path / "config.json", {"_class_name": "Flux2Transformer2DModel"})
    with pytest.raises(CorruptArtifact, match="Flux2Transformer2DModel"):
        load_network(tmp_path)
