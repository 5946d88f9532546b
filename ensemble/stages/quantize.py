"""Weight-only quantization: the folder of every expert, and of the router, with its matrices in few bits."""

import shutil
from pathlib import Path

from artifacts import MANIFEST, Workspace, write_json
from ensemble.stages.comparison import Comparison, StageError, compare
from ensemble.stages.config import QuantizeStageConfig
from experts.model_folder import pack_folder

COMPRESSION = "compression.json"


def quantize(config: QuantizeStageConfig, ensemble: Path, out: Path, workspace: Workspace) -> float:
    """Write the quantized ensemble and `compression.json` to `out`, and return the FLOPs of comparing.

    Raises `StageError` if an expert has no matrix that is large enough.
    """
    shutil.copytree(ensemble, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST, COMPRESSION))
    asked, count = config.quantize, 0
    for folder in sorted(path for path in out.iterdir() if (path / "config.json").is_file()):
        if folder.name == "codec" or (folder.name == "router" and not asked.router):
            continue
        packed = pack_folder(folder, asked.bits, asked.group, asked.least)
        if not packed and folder.name != "router":
            raise StageError(
                f"quantize found no matrix of at least {asked.least} entries in {folder.name}, so it would do nothing: "
                "lower quantize.least"
            )
        count += packed
    comparison, flops = compare("quantize", count, ensemble, out, config.sampling, config.num_samples, workspace)
    write_json(out / COMPRESSION, comparison)
    return flops


def describe(found: Comparison) -> str:
    """One line for a terminal."""
    share = found.bytes_after / found.bytes_before
    return (
        f"{found.modules} matrices, {found.bytes_before:,} to {found.bytes_after:,} bytes ({share:.2f} x), relative L2 "
        f"{found.relative_l2:.4f} on {found.num_samples} images"
    )
