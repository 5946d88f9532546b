"""What a compression stage wrote about itself; imports no torch, so that a report reads it quickly."""

from dataclasses import dataclass
from pathlib import Path

from ddm_core.artifacts import read_json

REPORT_FILE, TIMING_FILE = "compression.json", "timing.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedCost:
    """Cost of one request of so many images, of the original and of the compressed ensemble."""

    batch_size: int
    flops_before: float
    """FLOPs per image of all calls that really happen, without the codec's."""
    flops_after: float
    memory_before: int
    """Peak bytes of tensors: all networks, and what is alive at once while latents are sampled."""
    memory_after: int


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
    """Mean FLOPs per image of the original ensemble, in the largest request."""
    flops_after: float
    relative_l2: float
    """|| images - original images || / || original images ||, from the same noise."""
    num_samples: int
    guidance_scale: float
    """1 for samples without conditions or guidance."""
    served: tuple[ServedCost, ...]
    """By the size of the request, the smallest first."""
    notes: tuple[str, ...] = ()
    """What the last stage tried and chose, as lines for the terminal."""

    @property
    def memory_ratio(self) -> float:
        """Return the peak memory of the largest request, relative to the original ensemble's."""
        return self.served[-1].memory_after / self.served[-1].memory_before

    @classmethod
    def read(cls, path: Path) -> "CompressionReport":
        """Load a report from its JSON file."""
        fields = read_json(path)
        served = tuple(ServedCost(**cost) for cost in fields["served"])
        return cls(**fields | {"stages": tuple(fields["stages"]), "served": served, "notes": tuple(fields["notes"])})


def describe(report: CompressionReport) -> str:
    """Format a report as one line for a terminal."""
    bytes_ratio = report.bytes_after / report.bytes_before
    stages = " + ".join(report.stages)
    flops = "/".join(f"{cost.flops_after / cost.flops_before:.2f}" for cost in report.served)
    sizes = "/".join(str(cost.batch_size) for cost in report.served)
    summary = (
        f"{stages}: {report.modules} changed, {report.bytes_before:,} to {report.bytes_after:,} bytes "
        f"({bytes_ratio:.2f} x), {flops} x the FLOPs of an image in requests of {sizes}, {report.memory_ratio:.2f} x "
        f"the peak memory, relative L2 {report.relative_l2:.4f} on {report.num_samples} images at guidance "
        f"{report.guidance_scale:g}"
    )
    return "\n    ".join((summary, *report.notes))
