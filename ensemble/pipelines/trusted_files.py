"""Refuse folders of strangers that could run code, read other files or fill the memory, before anything is loaded."""

import struct
from pathlib import Path

from ensemble.pipeline_folder import PICKLE_SUFFIXES, PipelineError

CODE_SUFFIXES = (".py", ".pyc", ".so", ".dll")
MAX_HEADER_BYTES = 100_000_000
"""The header of a safetensors file lists its tensors; one of 30 billion parameters has less than a megabyte."""
HUB_BLOBS = "blobs"


def check_files(folder: Path) -> None:
    """Raise `PipelineError` for pickles, code, links out of the folder, or weights with an impossible header.

    Links of the Hub's cache into its own blobs are followed.
    """
    blobs = folder.resolve().parent.parent / HUB_BLOBS
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_symlink() and path.resolve().parent != blobs:
            raise PipelineError(f"{name} in {folder} is a link, which may point anywhere; replace it with its file")
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise PipelineError(
                f"files that may be pickles are never loaded, and {folder} holds {name}; "
                "convert it to safetensors, or delete it"
            )
        if path.suffix.lower() in CODE_SUFFIXES:
            raise PipelineError(f"code of a folder is never run, and {folder} holds {name}; read it, then delete it")
        if path.suffix == ".safetensors":
            _check_header(path)


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 0 < length <= min(MAX_HEADER_BYTES, path.stat().st_size - 8):
        raise PipelineError(
            f"{path} is not a safetensors file: its header would have {length:,} bytes of {path.stat().st_size:,}; "
            "copy it again"
        )
