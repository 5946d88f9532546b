from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ddm_core.artifacts import CorruptArtifact, list_files, read_json, write_json
from ensemble.config import SamplingConfig
from ensemble.ensemble import EnsembleError
from ensemble.pipeline import EnsemblePipeline, assemble
from ensemble.pipeline_folder import PipelineError
from ensemble.sampling.prompts import PromptError, Prompts
from experts.codec import PixelCodec
from experts.config import ResidualMLPConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.registry import build_network
from router.config import RouterConfig, SelectionConfig
from router.models.registry import build_router
from router.router import Router

SHAPE = (1, 4, 4)
FULL = SamplingConfig(solver="heun", steps=3, selection=SelectionConfig(name="full"), guidance_scale=2.0)


def make_expert(folder: Path, cluster_id: int, num_classes: int = 2) -> Path:
    torch.manual_seed(cluster_id)
    model = build_network(ResidualMLPConfig(width=8, depth=1), SHAPE, num_classes).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    expert = Expert(
        model=model,
        prediction="velocity",
        noise_schedule=RECTIFIED_FLOW,
        latent_shape=SHAPE,
        num_classes=num_classes,
        cluster_id=cluster_id,
    )
    expert.save(folder)
    (folder / "metrics.jsonl").write_text("{}\n")
    write_json(folder / "manifest.json", {})
    return folder


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Three experts, their router, a codec."""
    for k in range(3):
        make_expert(tmp_path / f"trained_{k}", k)
    torch.manual_seed(7)
    model = build_router(RouterConfig(width=8, depth=1), SHAPE, 3, 2)
    torch.nn.init.normal_(model.head.weight)
    counts = torch.tensor([[3, 2, 1], [1, 2, 3], [4, 4, 4]], dtype=torch.float64)
    Router(model=model, noise_schedule=RECTIFIED_FLOW, prior_counts=counts).save(tmp_path / "trained_router")
    codec = tmp_path / "codec"
    codec.mkdir()
    PixelCodec(image_shape=(4, 4, 1)).save(codec)
    return tmp_path


def put_together(parts: Path, present: tuple[int, ...] = (0, 1, 2), missing: tuple[int, ...] = ()) -> EnsemblePipeline:
    folders = {k: parts / f"trained_{k}" for k in present}
    return assemble(
        folders, parts / "trained_router", parts / "codec", parts / "pipeline", missing, class_names=("a", "b")
    )


def test_saved_and_loaded_pipeline_samples_equally(parts: Path) -> None:
    first = put_together(parts)
    first.save_pretrained(parts / "again")
    second = EnsemblePipeline.from_pretrained(parts / "again")
    result, repeated = (pipeline([5, 6, 7], FULL, Prompts.of_classes([0, 1, -1])) for pipeline in (first, second))
    assert torch.equal(result.latents, repeated.latents)
    assert result.images.shape == (3, 4, 4, 1)
    assert second.class_names == ("a", "b")


def test_from_pretrained_accepts_str_and_path(parts: Path) -> None:
    pipeline = put_together(parts)
    pipeline.save_pretrained(str(parts / "as_str"))
    for folder in (str(parts / "as_str"), parts / "as_str"):
        assert torch.equal(EnsemblePipeline.from_pretrained(folder)([5], FULL).latents, pipeline([5], FULL).latents)


def test_save_is_byte_identical_to_assemble(parts: Path) -> None:
    put_together(parts).save_pretrained(parts / "again")
    for file in list_files(parts / "again"):
        assert file.read_bytes() == (parts / "pipeline" / file.relative_to(parts / "again")).read_bytes(), file.name


def test_pipeline_takes_no_disk_for_its_networks(parts: Path) -> None:
    put_together(parts)
    name = "diffusion_pytorch_model.safetensors"
    assert (parts / "pipeline" / "expert_1" / name).samefile(parts / "trained_1" / name)


def test_shift_of_the_experts_reaches_scheduler_and_samples(parts: Path) -> None:
    plain = put_together(parts)([1, 2], FULL).latents
    for k in range(3):
        metadata = read_json(parts / f"trained_{k}" / "expert.json")
        assert "t_shift" not in metadata, "an expert without a shift has the same bytes as before there was one"
        replace(Expert.load(parts / f"trained_{k}"), t_shift=3.0).save(parts / f"trained_{k}")
    pipeline = put_together(parts)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(parts / "pipeline" / "scheduler")
    assert scheduler.config.shift == pipeline.ensemble.t_shift == 3.0
    pipeline.save_pretrained(parts / "again")
    again = EnsemblePipeline.from_pretrained(parts / "again")
    assert torch.equal(again([1, 2], FULL).latents, pipeline([1, 2], FULL).latents)
    assert not torch.equal(pipeline([1, 2], FULL).latents, plain)
    make_expert(parts / "trained_1", 1)
    with pytest.raises(PipelineError, match=r"t_shift; got \[1\.0, 3\.0\]"):
        put_together(parts)


def test_folder_is_a_diffusers_pipeline_folder(parts: Path) -> None:
    put_together(parts)
    index = read_json(parts / "pipeline" / "model_index.json")
    assert index["_class_name"] == "DDMPipeline"
    assert index["experts"] == [0, 1, 2]
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(parts / "pipeline" / "scheduler")
    assert scheduler.config.items() >= FlowMatchEulerDiscreteScheduler().config.items()
    copied = {file.name for file in list_files(parts / "pipeline")}
    assert "metrics.jsonl" not in copied
    assert "manifest.json" not in copied


def test_pipeline_samples_with_a_missing_expert(parts: Path) -> None:
    pipeline = put_together(parts, (0, 2), (1,))
    assert pipeline.ensemble.missing == (1,)
    result = pipeline(range(4), FULL)
    assert set(result.calls.experts) == {0, 2}
    assert result.images.isfinite().all()


def test_expert_neither_present_nor_listed_raises(parts: Path) -> None:
    with pytest.raises(PipelineError, match=r"lists \[\] as missing"):
        put_together(parts, (0, 2))
    put_together(parts)
    (parts / "pipeline" / "expert_1").rename(parts / "elsewhere")
    with pytest.raises(PipelineError, match="add 1 to the index's missing list"):
        EnsemblePipeline.from_pretrained(parts / "pipeline")
    file = parts / "pipeline" / "model_index.json"
    write_json(file, read_json(file) | {"missing": [1]})
    assert EnsemblePipeline.from_pretrained(parts / "pipeline").ensemble.missing == (1,)


def test_all_experts_missing_raises(parts: Path) -> None:
    with pytest.raises(PipelineError, match="all are missing"):
        put_together(parts, (), (0, 1, 2))
    put_together(parts)
    file = parts / "pipeline" / "model_index.json"
    write_json(file, read_json(file) | {"missing": [0, 1, 2]})
    with pytest.raises(EnsembleError, match="all are missing"):
        EnsemblePipeline.from_pretrained(parts / "pipeline")


@pytest.mark.parametrize("name", ["router/pytorch_model.bin", "expert_0/a.PT", "notes.pkl"])
def test_folder_with_pickles_raises(name: str, parts: Path) -> None:
    put_together(parts)
    (parts / "pipeline" / name).write_bytes(b"")
    with pytest.raises(PipelineError, match=name):
        EnsemblePipeline.from_pretrained(parts / "pipeline")


def test_monolith_is_a_pipeline_of_one_expert(parts: Path) -> None:
    pipeline = assemble({0: parts / "trained_0"}, None, parts / "codec", parts / "mono")
    result = pipeline(range(3), FULL.__class__(solver="euler", steps=2))
    assert result.calls_per_step == 1
    assert not (parts / "mono" / "router").exists()


def test_assemble_of_unfit_parts_leaves_no_folder(parts: Path) -> None:
    make_expert(parts / "trained_2", 2, num_classes=5)
    with pytest.raises(PipelineError, match="expert 2 has latents of shape"):
        put_together(parts)
    assert not (parts / "pipeline").exists()


@pytest.mark.parametrize("class_id", [2, -2])
def test_unknown_classes_raise(class_id: int, parts: Path) -> None:
    with pytest.raises(PromptError, match="classes go from 0 to 1"):
        put_together(parts)([1], FULL, Prompts.of_classes([class_id]))


@pytest.mark.parametrize(
    "broken", [{"_class_name": "Other"}, {"noise_schedule": "../x"}, {"experts": ["one"]}, {"missing": None}]
)
def test_index_of_another_class_raises(broken: dict[str, object], parts: Path) -> None:
    put_together(parts)
    file = parts / "pipeline" / "model_index.json"
    write_json(file, read_json(file) | broken)
    with pytest.raises(CorruptArtifact, match="not the index"):
        EnsemblePipeline.from_pretrained(parts / "pipeline")
