"""What an ensemble lacks while experts are missing: said wherever it is sampled."""

from ensemble.ensemble import Ensemble
from experts.condition import Condition


def data_shares(ensemble: Ensemble) -> tuple[float, ...]:
    """The share of the training samples that each expert stands for, be it missing or not."""
    if ensemble.router is None:
        return (1.0,)
    return tuple(ensemble.router.prior_logits(Condition.null(1)).softmax(-1)[0].tolist())


def missing_share(ensemble: Ensemble) -> float:
    """The share of the training samples whose experts are missing."""
    shares = data_shares(ensemble)
    return sum((shares[k] for k in ensemble.missing), 0.0)


def missing_warning(ensemble: Ensemble) -> str:
    """Which experts are missing and what they stood for, in a sentence; empty if all are there."""
    missing = ensemble.missing
    if not missing:
        return ""
    ids = ", ".join(map(str, missing))
    verb = "is" if len(missing) == 1 else "are"
    return (
        f"{len(missing)} of {ensemble.num_experts} experts {verb} missing ({ids}), which stood for "
        f"{100 * missing_share(ensemble):.1f} % of the data: what they knew is not drawn, the others share their gates"
    )
