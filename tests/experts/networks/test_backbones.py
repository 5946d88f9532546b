"""Every class of network at a tiny size: what an expert needs of it holds for all of them."""

import inspect
from copy import deepcopy

import pytest
import torch

from benchmarks.testbed.backbones import SHAPE, TINY, UNUSED, adapter_of, build, config_of, gradients, inputs, text
from experts.compressed.distillation.guidance_branch import extend_by_guidance, guidance_branches, guiding
from experts.compressed.distillation.interval_embedding import IntervalEmbedding, jumping
from experts.conditions.condition import Condition
from experts.conditions.null_text import get_null_text
from experts.conditions.text_embedding import TextEmbedding
from experts.config import DiffusersConfig
from experts.networks.adapters.registry import ADAPTERS
from experts.networks.class_settings import NetworkError, default_settings
from experts.networks.latent_shapes import check_condition, check_latent_shape
from experts.networks.model_io import save_model
from experts.networks.registry import (
    call_network,
    enable_gradient_checkpointing,
    extend_by_intervals,
    load_network,
    pack_latents,
    route_tasks,
    set_attention_backend,
    unpack_latents,
)

each_case = pytest.mark.parametrize("case", TINY)


def test_every_class_has_a_tiny_size():
    assert {case.partition("/")[0] for case in TINY} == ADAPTERS.keys() - {"ResidualMLP"}


@each_case
def test_every_parameter_has_a_gradient(case):
    missing = {name for name, gradient in gradients(build(case), case).items() if gradient is None}
    assert missing == UNUSED.get(case, set())


@each_case
def test_loaded_network_equals_saved_network(case, tmp_path):
    model = build(case)
    save_model(model, tmp_path)
    loaded = load_network(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(call_network(model, *inputs(case)), call_network(loaded, *inputs(case)))


@each_case
def test_an_interval_changes_nothing_until_it_is_trained(case, tmp_path):
    model, (noised, t, condition) = build(case), inputs(case)
    with torch.no_grad():
        base = call_network(model, noised, t, condition)
        extend_by_intervals(model)
        with jumping(model, t / 2):
            assert torch.equal(call_network(model, noised, t, condition), base)
        for module in model.modules():
            if isinstance(module, IntervalEmbedding):
                torch.nn.init.normal_(module.outer.weight)
        save_model(model, tmp_path)
        loaded = load_network(tmp_path)
        assert torch.equal(call_network(loaded, noised, t, condition), call_network(model, noised, t, condition))
        with jumping(loaded, t / 2):
            assert not torch.allclose(call_network(loaded, noised, t, condition), base)


@each_case
def test_branches_of_guidance_fit_every_network(case, tmp_path):
    model, (noised, t, condition) = build(case), inputs(case)
    null_text = get_null_text(model)
    negative = condition.rows(torch.tensor([1, 2, 0])).filled(null_text)
    condition = condition.filled(null_text).guided(3.0, negative)
    with torch.no_grad():
        base = call_network(model, noised, t, condition)
        text_width, pooled_width = (0, 0) if null_text is None else null_text.shape[1:]
        assert extend_by_guidance(model, 4, 3, text_width, pooled_width)
        with guiding(model, condition, t):
            assert torch.equal(call_network(model, noised, t, condition), base)
        for branch in guidance_branches(model).values():
            torch.nn.init.normal_(branch.outer.weight, std=0.1)
        save_model(model, tmp_path)
        loaded = load_network(tmp_path)
        assert torch.equal(call_network(loaded, noised, t, condition), base), "nothing without guidance"
        with guiding(loaded, condition, t):
            guided = call_network(loaded, noised, t, condition)
        assert not torch.allclose(guided, base)
        first = condition.rows(slice(0, 1))
        with guiding(model, first, t[:1]):
            alone = call_network(model, noised[:1], t[:1], first)
        torch.testing.assert_close(alone, guided[:1], atol=5e-6, rtol=5e-6)
        with guiding(model, condition.guided(3.0, condition.rows(torch.tensor([2, 0, 1]))), t):
            assert not torch.allclose(call_network(model, noised, t, condition), guided), "the negative one matters"


@each_case
def test_task_routing_passes_channels_by_every_block(case, tmp_path):
    model, (noised, t, condition) = build(case), inputs(case)
    if not adapter_of(case).blocks:
        with pytest.raises(NetworkError, match="UNet2DModel has none; choose one of .*DiTTransformer2DModel"):
            route_tasks(model, 0.5, 4.0)
        return
    with torch.no_grad():
        base = call_network(model, noised, t, condition)
        assert torch.equal(call_network(route_tasks(deepcopy(model), 1.0, 4.0), noised, t, condition), base)
        route_tasks(model, 0.5, 4.0)
        routing, seen, index = model.task_routing, [], adapter_of(case).block_output
        block = model.get_submodule(routing.blocks[-1])
        block.register_forward_pre_hook(lambda _, args: seen.append(routing.passing))
        block.register_forward_hook(lambda _, args, output: seen.append(output))
        block.forward, own = (lambda *args, **kwargs: seen.append(own(*args, **kwargs)) or seen[-1]), block.forward
        routed = call_network(model, noised, t, condition)
        passing, inner, outer = seen
        inner, outer = (part[index] if isinstance(part, tuple) else part for part in (inner, outer))
        assert passing.any() and not passing.masked_select(routing.window(passing)).any()
        torch.testing.assert_close(outer - inner, passing, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(routed, base)
        del block.forward
        save_model(model, tmp_path)
        assert torch.equal(call_network(load_network(tmp_path), noised, t, condition), routed)
        assert torch.equal(call_network(deepcopy(model), noised, t, condition), routed)
    with pytest.raises(NetworkError, match="leave expert.task_share at 1"):
        route_tasks(model, 0.5, 4.0)


@each_case
def test_a_row_alone_equals_the_row_in_a_batch(case):
    model, (noised, t, condition) = build(case), inputs(case)
    with torch.no_grad():
        together = call_network(model, noised, t, condition)
        for row in range(3):
            index = torch.tensor([row])
            alone = call_network(model, noised[index], t[index], condition.rows(index))
            assert alone.shape == (1, *SHAPE)
            torch.testing.assert_close(alone, together[index], atol=5e-6, rtol=5e-6)


@each_case
def test_prediction_depends_on_t_and_condition(case):
    model, (noised, t, condition) = build(case), inputs(case)
    with torch.no_grad():
        base = call_network(model, noised, t, condition)
        assert not torch.allclose(base, call_network(model, noised, 1 - t, condition))
        assert not torch.allclose(base, call_network(model, noised, t, Condition.null(3)), atol=1e-6)


@each_case
def test_padding_is_read_only_by_the_classes_that_admit_it(case):
    if not adapter_of(case).reads_text:
        return
    model, (noised, t, condition) = build(case), inputs(case)
    padding = ~condition.text.mask[..., None]
    sequence = torch.where(padding, 100.0, condition.text.sequence)
    junk = TextEmbedding(sequence, condition.text.mask, condition.text.pooled, condition.text.is_null)
    with torch.no_grad():
        base = call_network(model, noised, t, condition)
        changed = call_network(model, noised, t, Condition(condition.class_id, junk))
    assert torch.allclose(base, changed, atol=1e-6) is not adapter_of(case).reads_padding


TIMES = {
    "FluxTransformer2DModel": (0.25, 1),
    "Lumina2Transformer2DModel": (0.75, -1),
    "PRXTransformer2DModel": (0.25, 1),
    "QwenImageTransformer2DModel": (0.25, 1),
    "ZImageTransformer2DModel": (0.75, -1),
    "AuraFlowTransformer2DModel": (0.25, 1),
    "ChromaTransformer2DModel": (0.25, 1),
}
"""The timestep that diffusers' pipelines give at t = 0.25, and the sign of the velocity; the others take (250, 1)."""


@each_case
def test_t_and_sign_are_those_of_diffusers_pipelines(case):
    model, (noised, _, condition) = build(case), inputs(case)
    calls = []
    model.register_forward_hook(lambda _, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True)
    with torch.no_grad():
        predicted = call_network(model, noised, torch.tensor(0.25), condition)
    ((arguments, output),) = calls
    timestep, sign = TIMES.get(case.partition("/")[0], (250, 1))
    assert arguments.get("timestep", arguments.get("t")).tolist() == [timestep] * 3
    output = torch.stack(output).squeeze(2) if isinstance(output, list) else output
    assert torch.equal(predicted, sign * (unpack_latents(output, (4, 4)) if output.ndim == 3 else output))


@each_case
def test_another_text_length_is_an_error(case):
    model, (noised, t, condition) = build(case), inputs(case)
    with pytest.raises(ValueError, match="pad the text to its length|without text"):
        call_network(model, noised, t, Condition(condition.class_id, text(3, tokens=9)))


@each_case
def test_checkpointing_equals_plain_or_is_refused(case):
    plain, checkpointed = build(case), build(case)
    if adapter_of(case).checkpointing_fault:
        with pytest.raises(NetworkError, match="ChromaTransformer2DModel .* drops the attention mask"):
            enable_gradient_checkpointing(checkpointed)
        return
    enable_gradient_checkpointing(checkpointed)
    expected, actual = gradients(plain, case), gradients(checkpointed, case)
    for name, gradient in expected.items():
        assert gradient is actual[name] or torch.equal(gradient, actual[name]), name


@each_case
def test_latents_may_have_any_sides_that_fit(case):
    if adapter_of(case).is_square:
        return
    model, (noised, t, condition) = build(case), inputs(case, (4, 8, 12))
    with torch.no_grad():
        assert call_network(model, noised, t, condition).shape == noised.shape


@each_case
def test_abilities_are_those_of_the_class(case):
    model, adapter = build(case), adapter_of(case)
    assert hasattr(model, "add_adapter") is adapter.has_lora
    processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
    assert any(hasattr(processor, "_attention_backend") for processor in processors) is adapter.has_attention_backends


def test_defaults_are_read_without_importing_the_class():
    for adapter in ADAPTERS.values():
        signature = inspect.signature(adapter.model_class()).parameters
        expected = {
            name: None if parameter.default is parameter.empty else parameter.default
            for name, parameter in signature.items()
        }
        assert default_settings(adapter) == expected


def test_packing_is_that_of_flux():
    latents = torch.arange(4 * 4 * 6.0).reshape(1, 4, 4, 6)
    tokens = latents.view(1, 4, 2, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 6, 16)
    assert torch.equal(pack_latents(latents), tokens)
    assert torch.equal(unpack_latents(tokens, (2, 3)), latents)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DiffusersConfig(class_name="SD3Transformer2D"), "did you mean SD3Transformer2DModel"),
        (DiffusersConfig(class_name="PixArtTransformer2DModel", settings={"num_layer": 2}), "did you mean num_layers"),
        (DiffusersConfig(class_name="SanaTransformer2DModel", settings={"in_channels": 2}), "follow from the data"),
        (DiffusersConfig(class_name="PRXTransformer2DModel", settings={"patch_size": 3}), "does not divide 8"),
    ],
)
def test_wrong_settings_are_refused(config, message):
    with pytest.raises(NetworkError, match=message):
        check_latent_shape(config, SHAPE)


@pytest.mark.parametrize(
    ("case", "classes", "text_shape", "message"),
    [
        ("SD3Transformer2DModel", 0, None, "needs a text"),
        ("SD3Transformer2DModel", 3, (7, 24, 20), "no classes; set text.classes=false"),
        ("FluxTransformer2DModel", 0, (7, 24, 0), "needs the pooled vector"),
        ("UNet2DConditionModel/sdxl", 0, (7, 24, 0), "needs the pooled vector"),
        ("DiTTransformer2DModel", 3, (7, 24, 20), "reads classes and no text"),
    ],
)
def test_conditions_that_a_network_cannot_read_are_refused(case, classes, text_shape, message):
    with pytest.raises(NetworkError, match=message):
        check_condition(config_of(case), classes, text_shape)


@each_case
def test_attention_backend_is_refused_where_it_changes_nothing(case):
    model = build(case)
    if adapter_of(case).has_attention_backends:
        set_attention_backend(model, "native")
        with pytest.raises(NetworkError, match="cannot be used"):
            set_attention_backend(model, "unheard_of")
    else:
        with pytest.raises(NetworkError, match="would change nothing"):
            set_attention_backend(model, "native")
