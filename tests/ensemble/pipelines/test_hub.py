"""Upload to and download from a Hub that is a folder."""

import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError

from ensemble.pipeline_folder import PipelineError
from ensemble.pipelines.diffusion_pipeline import EnsembleDiffusionPipeline
from ensemble.pipelines.hub import local_folder


class FolderHub:
    """The three methods of `HfApi` that are used, on a folder; a snapshot links into blobs, as in the cache."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        if repo_id.startswith("taken/"):
            raise OSError("you don't have the rights to create a model under the namespace taken")
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}/commit/1"

    def snapshot_download(self, repo_id, *, revision=None, allow_patterns=()):
        if not (self.root / repo_id).is_dir():
            raise OSError(f"404: {repo_id}")
        snapshot, blobs = (self.root / "cache" / name for name in ("snapshots/1", "blobs"))
        blobs.mkdir(parents=True, exist_ok=True)
        for number, file in enumerate(sorted((self.root / repo_id).rglob("*"))):
            name = file.relative_to(self.root / repo_id)
            if file.is_file() and any(fnmatch(str(name), pattern) for pattern in allow_patterns):
                shutil.copyfile(file, blobs / str(number))
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                (snapshot / name).symlink_to(blobs / str(number))
        return str(snapshot)


def test_uploaded_pipeline_downloads_to_the_same_samples(pipe, tmp_path):
    hub = FolderHub(tmp_path / "hub")
    address = pipe.push_to_hub("me/digits", card="# Digits", client=hub)
    assert address == "https://hub/me/digits/commit/1"
    assert (tmp_path / "hub/me/digits/README.md").read_text() == "# Digits"
    (tmp_path / "hub/me/digits/evil.py").write_text("raise SystemExit")
    torch.save({}, tmp_path / "hub/me/digits/evil.bin")
    loaded = EnsembleDiffusionPipeline.from_pretrained(local_folder("me/digits", client=hub))
    loaded.set_progress_bar_config(disable=True)
    arguments = {"seeds": [1, 2], "class_labels": "a", "num_inference_steps": 2}
    assert torch.equal(loaded(**arguments).latents, pipe(**arguments).latents)


def test_refusals_of_the_hub_are_messages(pipe, tmp_path):
    hub = FolderHub(tmp_path)
    with pytest.raises(PipelineError, match="was not uploaded: you don't have the rights"):
        pipe.push_to_hub("taken/digits", card="", client=hub)
    with pytest.raises(PipelineError, match="cannot be downloaded from the Hub: 404"):
        local_folder("me/absent", client=hub)
    with pytest.raises(PipelineError, match="neither a folder nor the name of a repository"):
        local_folder("no such folder here")
    assert issubclass(HfHubHTTPError, OSError)
