"""The model card of a run, and the run's pipeline on its way to the Hub."""

import pytest
import torch
import yaml

import ddm
from ddm.model_card import render_model_card
from ensemble.pipeline_folder import PipelineError
from orchestrator.errors import RunFolderError
from orchestrator.run.run_folder import RunFolder
from tests.ensemble.pipelines.test_hub import FolderHub
from tests.laws.conftest import tiny_run  # noqa: F401 - a fixture


@pytest.mark.slow
def test_card_of_a_run_reaches_the_hub(tiny_run, tmp_path):  # noqa: F811 - the fixture
    pipe = ddm.DDMPipeline.from_pretrained(tiny_run)
    pipe.push_to_hub("me/tiny", license_name="mit", client=FolderHub(tmp_path))
    card = (tmp_path / "me/tiny/README.md").read_text()
    assert card == render_model_card(RunFolder(tiny_run), "me/tiny", "mit")
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header)["license"] == "mit"
    for heading in ("Data", "Clusters", "Training", "Scores", "Audit", "Licence"):
        assert f"## {heading}" in text
    assert 'DDMPipeline.from_pretrained("me/tiny")' in text
    assert "| expert_0 |" in text
    assert str(tiny_run) not in text
    assert (tmp_path / "me/tiny/model_index.json").is_file()


@pytest.mark.slow
def test_both_pipelines_open_a_run_and_refuse_other_folders(tiny_run, tmp_path):  # noqa: F811 - the fixture
    pipe, modular = (kind.from_pretrained(tiny_run) for kind in (ddm.DDMPipeline, ddm.DDMModularPipeline))
    state = modular(seeds=[3, 4], output_type="np")
    assert torch.equal(state.get("latents"), pipe(seeds=[3, 4], output_type="np").latents)
    assert modular.ensemble_pipeline.sampling == pipe.sampling
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").write_bytes((tiny_run / "config.yaml").read_bytes())
    for kind in (ddm.DDMPipeline, ddm.DDMModularPipeline):
        with pytest.raises(PipelineError, match=r"neither a pipeline folder .* nor a run folder"):
            kind.from_pretrained(tmp_path)
        with pytest.raises(RunFolderError, match="no finished"):
            kind.from_pretrained(tmp_path / "unfinished")
