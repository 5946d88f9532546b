"""Sampling from prompts: what an image depends on, and what is refused."""

import logging
from dataclasses import replace

import pytest
import torch

import ddm
from ensemble.config import SamplingConfig
from ensemble.pipeline import EnsemblePipeline
from ensemble.sampling.images import to_bytes
from ensemble.sampling.prompts import PromptError, Prompts
from experts.conditions.text_encoder import TextEncoder
from experts.conditions.text_files import TextError
from experts.training.latents.caption_costs import caption_flops
from orchestrator.cli.sample import SamplingRequest, save_grid
from router.config import SelectionConfig
from tests.ensemble.test_pipeline import parts, put_together  # noqa: F401 - a fixture
from tests.ensemble.text_pipeline import LENGTH, assemble_text_pipeline

SAMPLING = SamplingConfig(solver="euler", steps=3, guidance_scale=2.0, selection=SelectionConfig(name="sticky"))
CAPTIONS = ["a dark ankle boot", "", "a light shirt", "one two three"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return assemble_text_pipeline(tmp_path_factory.mktemp("text"))


def test_image_depends_on_its_seed_and_prompt_alone(pipeline):
    prompts = Prompts((0, -1, 1, -1), tuple(CAPTIONS))
    latents = pipeline([5, 6, 7, 8], SAMPLING, prompts).latents
    for row, seed in enumerate([5, 6, 7, 8]):
        alone = pipeline([seed], SAMPLING, prompts.rows(slice(row, row + 1))).latents
        torch.testing.assert_close(alone[0], latents[row], atol=1e-5, rtol=1e-4)
    other = pipeline([5, 6, 7, 8], SAMPLING, Prompts.of_captions(["a shirt"] * 4)).latents
    assert (other - latents).abs().flatten(1).amax(1).amin() > 1e-3


def test_empty_prompt_is_the_null_condition(pipeline):
    empty = pipeline([1, 2], SAMPLING, Prompts.of_captions(["", " "])).latents
    torch.testing.assert_close(empty, pipeline([1, 2], SAMPLING).latents, atol=1e-5, rtol=1e-4)


def test_sticky_draws_the_expert_from_the_prior_of_the_prompt(pipeline):
    router, count = pipeline.ensemble.router, 400
    condition = pipeline.condition(Prompts.of_captions(["a dark ankle boot"] * count))
    expected = router.prior_logits(condition.rows(slice(1))).softmax(-1)[0, 1].item()
    gates = pipeline.ensemble.init_routing(range(count), condition, SAMPLING.selection).fixed_gates(torch.zeros(count))
    assert abs(gates[:, 1].mean().item() - expected) < 0.08
    assert abs(expected - 0.5) > 0.1


def test_negative_prompt_is_the_other_branch_of_guidance(pipeline):
    """The same prompt on both sides cancels: u + s (u - u) = u. Nothing on that side is what it is by default."""
    prompts = Prompts.of_captions(["a dark ankle boot"] * 2)
    plain = pipeline([1, 2], replace(SAMPLING, guidance_scale=1.0), prompts).latents
    torch.testing.assert_close(pipeline([1, 2], SAMPLING, prompts, negative=prompts).latents, plain)
    guided, shirt = pipeline([1, 2], SAMPLING, prompts).latents, Prompts.of_captions(["a shirt"] * 2)
    nothing = Prompts.of_captions(["", ""])
    torch.testing.assert_close(pipeline([1, 2], SAMPLING, prompts, negative=nothing).latents, guided)
    assert (pipeline([1, 2], SAMPLING, prompts, negative=shirt).latents - guided).abs().max() > 1e-3
    with pytest.raises(ValueError, match="guidance_scale above 1"):
        pipeline([1, 2], replace(SAMPLING, guidance_scale=1.0), prompts, negative=shirt)


def test_saved_and_loaded_pipeline_follows_prompts_equally(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "again")
    again, prompts = EnsemblePipeline.from_pretrained(tmp_path / "again"), Prompts.of_captions(CAPTIONS)
    assert again.text == pipeline.text
    assert torch.equal(again(range(4), SAMPLING, prompts).latents, pipeline(range(4), SAMPLING, prompts).latents)


def test_prompt_that_is_too_long_is_cut_and_said(pipeline, caplog):
    words = ["boot"] * (LENGTH - 2)
    with caplog.at_level(logging.WARNING):
        long, cut = (
            pipeline([1], SAMPLING, Prompts.of_captions([" ".join(text)])) for text in ([*words, "shirt"], words)
        )
    assert "1 of 1 texts are longer than the 8 tokens" in caplog.text
    assert torch.equal(long.latents, cut.latents)


def test_prompt_for_experts_without_text_is_refused(parts):  # noqa: F811 - the fixture
    with pytest.raises(PromptError, match="trained without text.*text=minilm"):
        put_together(parts)([1], SAMPLING, Prompts.of_captions(["a boot"]))


def test_missing_encoder_is_one_error_and_classes_need_none(pipeline):
    lost = replace(pipeline, text=replace(pipeline.text, path="/no/such/encoder"))
    assert lost([1], SAMPLING, Prompts.of_classes([1])).latents.shape == (1, 1, 4, 4)
    with pytest.raises(TextError, match="/no/such/encoder"):
        lost([1], SAMPLING, Prompts.of_captions(["a boot"]))


def test_public_pipeline_takes_prompts_and_labels(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipe = ddm.DDMPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.sampling = SAMPLING
    pictures = pipe(seeds=[1, 2], prompt="a boot", negative_prompt="a shirt", class_labels="boot").images
    prompts = Prompts.of_captions(["a boot"] * 2, class_id=0)
    expected = pipeline([1, 2], SAMPLING, prompts, negative=Prompts.of_captions(["a shirt"] * 2)).images
    assert [list(picture.getdata()) for picture in pictures] == to_bytes(expected).reshape(2, -1).tolist()
    one_each = pipe(seeds=[1, 2], prompt=["a boot", "a shirt"]).latents
    expected = pipeline([1, 2], SAMPLING, Prompts.of_captions(["a boot", "a shirt"])).latents
    torch.testing.assert_close(one_each, expected)
    with pytest.raises(PromptError, match="did you mean 'shirt'"):
        pipe(seeds=[1], class_labels="Shirts")
    with pytest.raises(ValueError, match="every image needs one of each"):
        pipe(seeds=[1, 2], prompt=["a boot"])


def test_grid_has_one_row_a_prompt(pipeline, tmp_path):
    request = SamplingRequest(pipeline=pipeline, config=SAMPLING, prompts=("a boot", "a shirt"))
    samples = request.sample([3, 4, 5])
    for row, prompt in enumerate(request.prompts):
        alone = pipeline([3, 4, 5], SAMPLING, Prompts.of_captions([prompt] * 3)).latents
        torch.testing.assert_close(samples.latents[3 * row : 3 * row + 3], alone, atol=1e-5, rtol=1e-4)
    assert "6 images" in save_grid(request, samples, tmp_path / "grid.png")


def test_flops_of_a_prompt_are_those_of_encoder_and_prior(tmp_path):
    pipeline = assemble_text_pipeline(tmp_path)
    encoder = TextEncoder.from_config(pipeline.text)
    features = encoder.null_text.shape[2] + pipeline.num_classes
    assert pipeline.text_flops() == caption_flops(encoder) + 2 * features * 2
