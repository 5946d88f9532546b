"""Two ensembles by turns: the smaller one on one side of a t, the whole one on the other.

Multi-UNet switching of Li et al. 2024, A-SDM, arXiv:2406.00210, which puts the small network where the noise is. By
the distance to the whole ensemble's samples the other order is better: what goes wrong early moves all that follows.
"""

from pathlib import Path

from ensemble.pipeline import DDMPipeline
from ensemble.schedule import ScheduledExpert
from ensemble.stages.config import SwitchConfig
from ensemble.stages.method import StageError
from experts.expert import Expert


def switched(config: SwitchConfig, smaller: Path, whole: Path) -> dict[int, ScheduledExpert]:
    """The experts by their ids; `StageError` if there is no smaller ensemble."""
    if smaller == whole:
        raise StageError("switch goes between a smaller ensemble and the whole one; add prune=… or quantize=…")
    few, all_ = (DDMPipeline.from_pretrained(folder).ensemble.experts for folder in (smaller, whole))
    made = {}
    for k in all_:
        small, full = few[k], all_[k]
        if not isinstance(small, Expert) or not isinstance(full, Expert):
            raise StageError(f"switch goes between experts of their own; expert {k} is a {type(full).__name__}")
        networks = (small, full) if config.small == "clean" else (full, small)
        made[k] = ScheduledExpert(networks=networks, bounds=(config.t,))
    return made
