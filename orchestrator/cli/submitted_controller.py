"""The controller of a run as a job on a Ray cluster: what `ddm submit` starts there."""

import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrator.cli.app import main as ddm
from orchestrator.cli.submit import confirm_folder_seen
from orchestrator.errors import RunFolderError
from orchestrator.run.run_folder import RunFolder


def main(arguments: Sequence[str]) -> None:
    """Be the submitted controller of a run folder: `python -m orchestrator.cli.submitted_controller FOLDER ID`."""
    folder, submission_id = arguments
    try:
        confirm_folder_seen(RunFolder(Path(folder)), submission_id)
    except RunFolderError as error:
        sys.exit(f"Error: {error}")
    sys.argv = ["ddm", "resume", folder]
    ddm()


if __name__ == "__main__":
    main(sys.argv[1:])
