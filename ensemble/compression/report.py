"""What a compression stage wrote about itself; imports no torch, so that a report reads it quickly."""

from dataclasses import dataclass
from pathlib import Path

from ddm_core.artifacts import read_json

REPORT_FILE, TIMING_FILE = "compression.json", "timing.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionReport:
    """Total effect of all stages up to this one, against the original ensemble; written as `compression.json`."""

    stages: tuple[str, ...]
    """Labels of the stages so far, in order."""
    modules: int
    """Number of weights, layers or units that the last stage changed."""
    bytes_before: int
    """Bytes on disk of the original experts and router; both ensembles have the same codec, which is left out."""
    bytes_after: int
    flops_before: float
    """Mean FLOPs per image of the original ensemble."""
    flops_after: float
    relative_l2: float
    """|| images - original images || / || original images ||, from the same noise."""
    num_samples: int

    @classmethod
    def read(cls, path: Path) -> "CompressionReport":
        """Load a report from its JSON file."""
        fields = read_json(path)
        return cls(**fields | {"stages": tuple(fields["stages"])})


def describe(report: CompressionReport) -> str:
    """Format a report as one line for a terminal."""
    bytes_ratio, flops_ratio = report.bytes_after / report.bytes_before, report.flops_after / report.flops_before
    stages = " + ".join(report.stages)
    return (
        f"{stages}: {report.modules} changed, {report.bytes_before:,} to {report.bytes_after:,} bytes "
        f"({bytes_ratio:.2f} x), {flops_ratio:.2f} x the FLOPs of an image, relative L2 {report.relative_l2:.4f} on "
        f"{report.num_samples} images"
    )
