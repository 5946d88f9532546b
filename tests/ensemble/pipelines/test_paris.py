"""Import of the published layout, with synthetic weights, against a forward pass of its own."""

import shutil

import pytest
import torch

from benchmarks.testbed.paris_layout import (
    CHANNELS,
    EXPERTS,
    HEADS,
    SIDE,
    TEXT,
    ParisReference,
    expert_weights,
    router_weights,
    write_paris,
)
from ensemble.pipeline_folder import PipelineError
from ensemble.pipelines.diffusion_pipeline import EnsembleDiffusionPipeline
from ensemble.pipelines.modular import EnsembleModularPipeline
from ensemble.pipelines.paris import convert_expert, convert_router, import_paris
from experts.conditions.condition import Condition
from experts.conditions.null_text import set_null_text
from experts.conditions.text_embedding import TextEmbedding
from experts.networks.registry import call_network


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    noised, text = (
        torch.randn(3, CHANNELS, SIDE, SIDE, generator=generator),
        torch.randn(3, 7, TEXT, generator=generator),
    )
    return noised, torch.tensor([0.003, 0.5, 0.9985]), text


@torch.no_grad()
def test_expert_equals_the_reference(inputs):
    noised, t, sequence = inputs
    text = TextEmbedding(sequence, torch.ones(3, 7).bool(), torch.zeros(3, 0), torch.zeros(3).bool())
    network = set_null_text(convert_expert(expert_weights(), HEADS), text.rows(slice(1)))
    actual = call_network(network, noised, t, Condition(torch.full((3,), -1), text))
    expected = ParisReference(expert_weights()).velocity(noised, 1000 * t, sequence)
    assert (actual - expected).abs().max() < 1e-5
    assert expected.abs().max() > 1


@torch.no_grad()
def test_router_equals_the_reference(inputs):
    noised, t, _ = inputs
    router = convert_router(router_weights(), HEADS)
    actual = router.logits(noised, t, Condition.null(3))
    expected = ParisReference(router_weights()).logits(noised, 1000 * t)
    assert ((actual - expected) - (actual - expected)[:, :1]).abs().max() < 1e-5
    assert router.prior_counts.shape == (1, EXPERTS)
    assert router.prior_counts.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors | {"pos_embed": tensors["pos_embed"] + 0.01}, "table of sines"),
        (lambda tensors: tensors | {"layers.0.extra": torch.zeros(1)}, "no layers.0.extra"),
        (
            lambda tensors: {name: value for name, value in tensors.items() if name != "t_block.1.bias"},
            "t_block.1.bias",
        ),
        (lambda tensors: tensors | {"t_block.1.bias": torch.zeros(3)}, "size mismatch"),
    ],
)
def test_other_layouts_are_refused(change, reason):
    with pytest.raises(PipelineError, match=reason):
        convert_expert(change(expert_weights()), HEADS)


def test_router_of_another_layout_is_refused():
    with pytest.raises(PipelineError, match="router of Paris"):
        convert_router(router_weights() | {"text.weight": torch.zeros(1)}, HEADS)


@pytest.fixture
def paris(tmp_path):
    return write_paris(tmp_path / "paris")


def test_folder_samples_from_prompts(paris, tmp_path):
    pipe = import_paris(paris)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"seeds": [1, 2], "num_inference_steps": 2, "guidance_scale": 2.0}
    images = pipe(["a", "b"], **arguments, selection="top_k", output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    sticky = pipe("a", **arguments | {"seeds": [1]})
    assert sticky.call_counts.router == 0
    other = pipe("b", **arguments | {"seeds": [1]})
    assert (sticky.latents - other.latents).abs().max() > 1e-4
    pipe.save_pretrained(tmp_path / "ours")
    shutil.rmtree(paris)
    again = EnsembleDiffusionPipeline.from_pretrained(tmp_path / "ours")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again("a", **arguments | {"seeds": [1]}).latents, sticky.latents)
    assert again.expert_0.norm_out.eps == 1e-5
    modular = EnsembleModularPipeline.from_pretrained(tmp_path / "ours")
    assert torch.equal(modular(prompt="a", **arguments | {"seeds": [1]}, output="latents"), sticky.latents)


def test_folder_with_code_is_refused(paris):
    (paris / "inference.py").write_text("raise SystemExit")
    with pytest.raises(PipelineError, match="code of a folder is never run"):
        import_paris(paris)
