"""Sizes of trainings on the meta device: as of real networks, for networks that fit nowhere."""

from dataclasses import replace

import pytest
import torch

from benchmarks.testbed.backbones import PUBLISHED, count_published
from experts.codecs.registry import CODECS
from experts.conditions.condition import Condition
from experts.config import DiffusersConfig, DiTConfig, ExpertConfig, TrainingConfig
from experts.expert import expert_flops
from experts.networks.adapters.adapter import DataShape
from experts.networks.registry import build_network, call_network
from experts.training.flops import count_parameters, forward_flops, training_flops
from experts.training.memory import peak_training_bytes
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.pipeline.graph import build_graph
from orchestrator.planning.network_sizes import TrainingSize, measure_expert, measure_trainings

CLASSES = 10


def build_config(*overrides):
    return parse_config(compose(["experiment=digits", *overrides]))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("codec=pixels", "expert=dit"),
        ("codec=pixels", "expert=unet"),
        ("codec=patch_pca", "codec.patch_size=2", "codec.latent_channels=3", "expert=dit"),
        ("router=transformer",),
    ],
)
def test_sizes_equal_those_of_real_networks(overrides):
    config = build_config(*overrides)
    size = measure_trainings(build_graph(config), config, CLASSES)["expert_0"]
    shapes = {"codec=pixels": (1, 8, 8), "codec=patch_pca": (3, 4, 4)}
    shape = next((shapes[key] for key in overrides if key in shapes), (config.codec.components,))
    expert = next(stage for stage in build_graph(config) if stage.name == "expert_0").config.expert
    network = build_network(expert.network, shape, CLASSES)
    rows = expert.training.batch_size
    inputs = torch.zeros(rows, *shape), torch.zeros(rows), Condition(torch.zeros(rows, dtype=torch.int64))
    memory = peak_training_bytes(network.train(), lambda: call_network(network, *inputs), expert.training)
    assert size.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert size.flops == expert_flops(expert, shape, CLASSES)
    assert size.memory_bytes == pytest.approx(memory, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "stage"), [("patch_pca_conv", "decoder"), ("pca_conv", "decoder"), ("autoencoder_kl", "codec")]
)
def test_codec_that_trains_has_a_size(kind, stage):
    config = build_config(f"codec={kind}", "codec.patch_size=2", "codec.latent_channels=4")
    sizes = measure_trainings(build_graph(config), config, CLASSES)
    assert sizes.keys() >= {stage} and len(sizes.keys() & {"codec", "decoder"}) == 1
    size = sizes[stage]
    network, call = CODECS[kind].probe(config.codec, (8, 8, 1))
    assert size.parameters == count_parameters(network) > 0
    training = config.codec.decoder_training
    assert size.flops == training_flops(forward_flops(call), training.batch_size, training.steps)


def test_larger_batch_needs_more_memory_for_activations_alone():
    config = build_config()
    expert = config.expert
    double = replace(config, expert=replace(expert, training=replace(expert.training, batch_size=512)))
    small, large = (measure_trainings(build_graph(c), c, 0)["expert_0"] for c in (config, double))
    assert small.parameters == large.parameters and small.memory_bytes < large.memory_bytes


def published(name, side=32):
    return build_config(f"expert={name}").expert.network, PUBLISHED[name].data(side)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_their_parameters(name):
    assert count_published(*published(name)) / 1e6 == pytest.approx(PUBLISHED[name].millions, rel=0.01)


@pytest.mark.parametrize(("name", "side", "gigaflops"), [("sd15", 64, 803), ("flux_3b", 32, 1860), ("prx_1b", 32, 452)])
def test_published_sizes_have_their_flops(name, side, gigaflops):
    network, data = published(name, side)
    training = TrainingConfig(batch_size=1, steps=1, warmup_steps=0)
    size = measure_expert(ExpertConfig(network=network, training=training), data)
    assert size.flops / 3e9 == pytest.approx(gigaflops, rel=0.01)
    assert 19.9 <= size.memory_bytes / size.parameters < 30


def test_work_by_text_lengths_counts_the_longest():
    settings = {"dim": 48, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [8, 8, 8]}
    training = TrainingConfig(batch_size=2)
    network = DiffusersConfig(class_name="ZImageTransformer2DModel", settings=settings)
    short, long = (
        measure_expert(
            ExpertConfig(network=network, training=training),
            DataShape(latent_shape=(4, 8, 8), text_shape=(tokens, 24, 0)),
        )
        for tokens in (32, 64)
    )
    assert short.flops < long.flops and short.memory_bytes < long.memory_bytes


def test_checkpointing_needs_less_memory_and_more_flops():
    settings = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 8, "cross_attention_dim": 64}
    network = DiffusersConfig(class_name="PixArtTransformer2DModel", settings=settings)
    data = DataShape(latent_shape=(4, 16, 16), text_shape=(16, 64, 0))
    plain, checkpointed = (
        measure_expert(
            ExpertConfig(network=network, training=TrainingConfig(batch_size=32, gradient_checkpointing=value)), data
        )
        for value in (False, True)
    )
    assert checkpointed.memory_bytes < 0.4 * plain.memory_bytes
    assert checkpointed.flops == pytest.approx(4 / 3 * plain.flops)


def test_parts_of_a_batch_need_less_memory():
    network = DiTConfig(depth=2)
    data = DataShape(latent_shape=(4, 16, 16))
    whole, divided, small = (
        measure_expert(ExpertConfig(network=network, training=TrainingConfig(batch_size=rows, accumulate=parts)), data)
        for rows, parts in ((64, 1), (64, 4), (16, 1))
    )
    assert divided.flops == whole.flops and divided.memory_bytes < 0.5 * whole.memory_bytes
    assert 0 <= divided.memory_bytes - small.memory_bytes <= 4 * small.parameters, "the gradients of earlier parts"


def test_plan_counts_the_state_of_the_optimizer():
    adamw, muon = (
        measure_expert(ExpertConfig(training=TrainingConfig(optimizer=name)), DataShape(latent_shape=(96,)))
        for name in ("adamw", "muon")
    )
    matrices = 2 * 4 * 448 * 448
    assert adamw.checkpoint_bytes == 16 * adamw.parameters
    assert adamw.checkpoint_bytes - muon.checkpoint_bytes == adamw.memory_bytes - muon.memory_bytes == 4 * matrices


def test_time_is_that_of_the_flops_on_a_device_that_is_here():
    size = TrainingSize(parameters=10, flops=1e9, memory_bytes=200, checkpoint_bytes=160)
    seconds = size.least_seconds("cpu", 1)
    assert seconds > 0
    assert replace(size, flops=2e9).least_seconds("cpu", 1) == pytest.approx(2 * seconds)
    assert size.least_seconds("nowhere", 1) is None
    assert (size.host_bytes("cpu"), size.host_bytes("cuda")) == (0, 160)


def test_text_is_read_by_experts_and_router():
    configs = [build_config("data.labels=false", *overrides) for overrides in (["text=minilm"], [])]
    with_text, without = (measure_trainings(build_graph(config), config, 0) for config in configs)
    assert all(with_text[name].parameters > without[name].parameters for name in ("expert_0", "router"))


def test_network_without_end_is_measured_without_memory():
    config = build_config("expert.network.width=65536", "expert.network.depth=24")
    size = measure_trainings(build_graph(config), config, 0)["monolith"]
    assert size.parameters > 10**11 and size.flops > 10**16


def test_classes_that_no_model_reads_are_not_counted():
    config = build_config("text=minilm", "text.classes=false", "codec=pixels", "expert=pixart_small")
    sizes = [measure_trainings(build_graph(config), config, classes) for classes in (CLASSES, 0)]
    assert sizes[0] == sizes[1]
