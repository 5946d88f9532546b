"""`ddm verify`: compare every file of a run or an artifact with its checksum."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from orchestrator.errors import RunFolderError
from orchestrator.reporting.terminal import AsJson, open_console, print_json

console = open_console()


def verify(
    folder: Annotated[Path, typer.Argument(help="A run folder, or the folder of one artifact", metavar="RUN|FOLDER")],
    as_json: AsJson = False,
) -> None:
    """Compare every file of a run, or of one artifact, with its checksum."""
    folder = folder.expanduser()
    artifacts = find_artifacts(folder)
    damaged = [message for artifact in artifacts if (message := check_artifact(artifact))]
    if as_json:
        print_json({"folder": folder, "artifacts": len(artifacts), "damaged": damaged})
    for message in damaged:
        console.print(Text.assemble(("✘", "red"), f" {message}"), soft_wrap=True)
    if damaged:
        raise RunFolderError(
            f"{len(damaged)} of {len(artifacts)} artifacts of {folder} are damaged; delete their folders, and "
            "`ddm resume` makes them again"
        )
    console.print(f"{len(artifacts)} artifacts of {folder}: every file matches its checksum.", soft_wrap=True)


def find_artifacts(folder: Path) -> list[Path]:
    """Return the finished artifacts of a run folder, after its configuration is verified, or the folder itself."""
    from ddm_core.artifacts import MANIFEST
    from orchestrator.run.run_folder import RunFolder

    if (folder / MANIFEST).is_file():
        return [folder]
    RunFolder(folder).load_config()
    artifacts = folder / "artifacts"
    entries = sorted(artifacts.iterdir()) if artifacts.is_dir() else []
    return [entry for entry in entries if (entry / MANIFEST).is_file()]


def check_artifact(folder: Path) -> str:
    """Return what is wrong with an artifact, or an empty string."""
    from ddm_core.artifacts import ArtifactError
    from ddm_core.artifacts import verify as verify_artifact

    try:
        verify_artifact(folder)
    except ArtifactError as error:
        return str(error)
    return ""
