"""Pipeline folders on the Hub: downloaded without anything that could run, uploaded with their model card."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ddm_core.hub_files import HubError, download_snapshot
from ensemble.pipeline_folder import PipelineError

PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "README.md")
"""Files that are downloaded: no code, and no file that may be a pickle."""
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
README = "README.md"
MINIMAL_CARD = """---
library_name: diffusers
tags: [decentralized-diffusion, diffusers]
---

# {name}

An ensemble of {count} diffusion models that sample as one: `ddm.DDMPipeline.from_pretrained("{name}")`.
"""
"""The card of a pipeline of which no run is known."""


def local_folder(name: str, revision: str | None = None, token: str | None = None, client: Any = None) -> Path:
    """Return a folder of this machine, or download `owner/name` from the Hub and return the folder of the copy.

    `client` is an `HfApi`. Raises `PipelineError` for a name that is neither, or a repository that cannot be read.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not REPOSITORY.fullmatch(name):
        raise PipelineError(f"{name} is neither a folder nor the name of a repository, owner/name; give one of them")
    try:
        return download_snapshot(name, PATTERNS, revision=revision, client=client or HfApi(token=token))
    except HubError as error:
        raise PipelineError(f"{name} is no folder here, and cannot be downloaded from the Hub: {error}") from error


def upload(folder: Path, repository: str, card: str, message: str, *, private: bool | None, client: Any) -> str:
    """Write the model card into a pipeline's folder, upload the folder, and return the address of the commit.

    Raises `PipelineError` if the Hub refuses it.
    """
    (folder / README).write_text(card, encoding="utf-8")
    try:
        client.create_repo(repository, private=private, exist_ok=True)
        commit = client.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PipelineError(f"{repository} was not uploaded: {reason}; check the name and the token") from error
    return str(getattr(commit, "commit_url", commit))
