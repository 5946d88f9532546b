"""The entry point of a controller that `ddm submit` starts as a job on a Ray cluster."""

import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrator.cli.app import main as run_ddm
from orchestrator.cli.submit import confirm_submission
from orchestrator.errors import RunFolderError
from orchestrator.run.run_folder import RunFolder


def main(arguments: Sequence[str]) -> None:
    """Run `python -m orchestrator.cli.submitted_controller FOLDER ID`: check the folder, then resume its run."""
    folder, submission_id = arguments
    try:
        confirm_submission(RunFolder(Path(folder)), submission_id)
    except RunFolderError as error:
        sys.exit(f"Error: {error}")
    sys.argv = ["ddm", "resume", folder, "--trust"]  # the submission came with this cluster's token
    run_ddm()


if __name__ == "__main__":
    main(sys.argv[1:])
