"""The models of a finished run, and of folders."""

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from experts.networks.lora import AdapterError
from orchestrator.cli.sample import SamplingOptions, prepare_sampling
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.controller import run_pipeline
from orchestrator.errors import ConfigError, RunFolderError
from orchestrator.run.run_folder import RunFolder
from orchestrator.serving.backend import open_models
from orchestrator.serving.config import Batching, Limits
from orchestrator.serving.model import read_adapters
from orchestrator.serving.request import ImageRequest, check_request
from orchestrator.serving.sources import find_sources
from tests.ensemble.text_pipeline import assemble_text_pipeline
from tests.orchestrator.cli.test_compression import TINY


@pytest.mark.integration
def test_a_run_is_served_with_its_compressions(tmp_path):
    """Its images are those of `ddm sample`, up to one level, with its own settings of reflection and selections."""
    overrides = [*TINY, f"folder={tmp_path / 'digits'}", "quantize=int8_weight_only", "monolith=true"]
    overrides += ["ensemble.reflection.weak=monolith", "scores.selections=[{name: top_k, k: 2}]"]
    run_pipeline(parse_config(compose(overrides)), Console(quiet=True))
    sources = find_sources([str(tmp_path / "digits")])
    assert [source.name for source in sources] == ["digits", "digits:quantize"]
    models = open_models(sources, Batching())
    assert models["digits"].facts.compressions == ("quantize",) and models["digits"].facts.steps == 4
    body = ImageRequest(class_label=3, seeds=[1], compression="quantize")
    generation = check_request(body, models["digits"].facts, Limits())
    assert generation.model == "digits:quantize"
    latents = [model.denoise(key, [job])[0] for model in models.values() for key, job in model.plan(generation)]
    assert not torch.equal(*latents) and torch.allclose(*latents, atol=0.5)
    for selection in ("", "sticky", "full", "top_k_2"):
        options = SamplingOptions(label="3", selection=selection)
        sampled = prepare_sampling(RunFolder(tmp_path / "digits"), tmp_path / "grid.png", options).sample([7])
        body = ImageRequest(class_label=3, seeds=[7], selection=selection or None)
        ((key, job),) = models["digits"].plan(check_request(body, models["digits"].facts, Limits()))
        assert torch.allclose(models["digits"].denoise(key, [job])[0], sampled.latents, atol=1e-4)


def test_a_folder_has_its_name_or_another_once(tmp_path):
    assemble_text_pipeline(tmp_path)
    folder = tmp_path / "pipeline"
    assert [source.name for source in find_sources([str(folder), f"b={folder}"])] == ["pipeline", "b"]
    with pytest.raises(ConfigError, match="two models are named pipeline"):
        find_sources([str(folder), str(folder)])
    with pytest.raises(RunFolderError, match=r"no model_index\.json"):
        find_sources([str(tmp_path)])


def test_adapters_are_found_once_and_must_fit(tmp_path):
    folder = assemble_text_pipeline(tmp_path).folder
    own, shared = tmp_path / "own", tmp_path / "one.safetensors"
    (own / "expert_1").mkdir(parents=True)
    save_file(
        {"transformer.x.lora_A.weight": torch.ones(1, 2), "transformer.x.lora_B.weight": torch.ones(2, 1)}, shared
    )
    names = [f"a={folder}", f"b={folder}"]
    first, second = find_sources(names, [f"style={own}", f"b:style={shared}"])
    assert (first.adapters, second.adapters) == (
        {"style": {1: own / "expert_1"}},
        {"style": {0: shared, 1: shared}},
    )
    with pytest.raises(AdapterError, match="x is no layer of the expert"):
        read_adapters(second)
    for texts, reason in (
        (["style"], "NAME=FOLDER"),
        ([f"c:style={own}"], "among a, b"),
        ([f"style={tmp_path / 'none'}"], "is not there"),
        ([f"style={own}", f"style={own}"], "a has style already"),
    ):
        with pytest.raises(ConfigError, match=reason):
            find_sources(names, texts)
