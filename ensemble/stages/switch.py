"""Two ensembles by turns: the smaller one on one side of a t, the whole one on the other.

Multi-UNet switching of Li et al. 2024, A-SDM, arXiv:2406.00210, which puts the small network where the noise is. By
the distance to the whole ensemble's samples the other order is better: what goes wrong early moves all that follows.
"""

from ensemble.ensemble import Speaker
from ensemble.schedule import ScheduledExpert
from ensemble.stages.config import SwitchConfig
from ensemble.stages.method import StageError
from ensemble.stages.together import Given, Together
from experts.expert import Expert


def switch(config: SwitchConfig, given: Given) -> Together:
    """The experts by turns; `StageError` if there is no smaller ensemble, or one that is asked at few t."""
    if given.ensemble == given.whole:
        raise StageError("switch goes between a smaller ensemble and the whole one; add prune=… or quantize=…")
    few, all_ = given.experts("switch"), given.speakers(whole=True)
    made: dict[int, Speaker] = {}
    for k, small in few.items():
        full = all_[k]
        if small.course is not None or not isinstance(full, Expert):
            raise StageError(
                f"switch goes between experts that are asked at any t, and expert {k} is not; after distill=… "
                "take accelerate=base_first"
            )
        networks = (small, full) if config.small == "clean" else (full, small)
        made[k] = ScheduledExpert(networks=networks, bounds=(config.t,))
    return Together(experts=made, modules=len(made), flops=0.0)
