"""Files of a repository on the Hugging Face Hub: those of given patterns, and the reason where they cannot be had."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddm_core.errors import DDMError

MAX_REASON = 300
"""Characters of the Hub's own message that are passed on."""


class HubError(DDMError):
    """The Hub does not give a repository; the message is its reason, on one line."""


def download_snapshot(
    repository: str, patterns: Sequence[str], *, revision: str | None = None, client: Any = None
) -> Path:
    """Return the folder of a repository's copy, which is named by its commit, with the files that match `patterns`.

    `client` is an `HfApi`; None makes one. Raises `HubError`.
    """
    from huggingface_hub import HfApi  # takes as long to import as torch
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        api = client or HfApi()
        return Path(api.snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise HubError(" ".join(str(error).split())[:MAX_REASON]) from error
