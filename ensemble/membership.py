"""Experts that leave an ensemble, come back to it, or join it; what was there stays as it is.

Who leaves is missing from then on: the others share its gates, and nobody's id changes. Who comes back takes a place
that is missing. Who joins is the last, and needs a router that knows it: see `router/add_remove.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ensemble.ensemble import Ensemble, ExpertModel, RouterModel
from ensemble.pipeline import DDMPipeline, PipelineError
from experts.condition import Condition
from experts.expert import Expert


def without_experts(pipeline: DDMPipeline, ids: Sequence[int]) -> DDMPipeline:
    """The ensemble without these experts; raises `PipelineError` if one is not there, or if none would be left."""
    present = pipeline.ensemble.experts
    if absent := sorted(set(ids) - set(present)):
        raise PipelineError(f"experts to remove must be among {sorted(present)}, which are there; got {absent}")
    left = {k: expert for k, expert in present.items() if k not in ids}
    if not left:
        raise PipelineError(f"an ensemble needs an expert; {sorted(ids)} are all of this one: leave one in it")
    return _with(pipeline, left, pipeline.ensemble.router)


def with_expert_back(pipeline: DDMPipeline, expert: Expert, place: int) -> DDMPipeline:
    """The ensemble with an expert in the place of a missing one; the router knows that place already."""
    missing = pipeline.ensemble.missing
    if place not in missing:
        known = f"missing are {list(missing)}" if missing else "none is missing"
        raise PipelineError(f"an expert takes the place of a missing one, and {known}; got place {place}")
    _check_fit(pipeline, expert)
    experts = {**pipeline.ensemble.experts, place: replace(expert, cluster_id=place)}
    return _with(pipeline, experts, pipeline.ensemble.router)


def with_new_expert(pipeline: DDMPipeline, expert: Expert, router: RouterModel) -> DDMPipeline:
    """The ensemble with one expert more, of id K, and a router that knows K + 1."""
    last = pipeline.ensemble.num_experts
    if router.num_experts != last + 1:
        raise PipelineError(f"the router must know the {last} experts and the new one; it knows {router.num_experts}")
    _check_fit(pipeline, expert)
    experts = {**pipeline.ensemble.experts, last: replace(expert, cluster_id=last)}
    return _with(pipeline, experts, router)


def _check_fit(pipeline: DDMPipeline, expert: Expert) -> None:
    ours, theirs = (
        (pipeline.codec.latent_shape, pipeline.num_classes),
        (expert.latent_shape, expert.num_classes),
    )
    if ours != theirs:
        raise PipelineError(
            f"an expert must know the ensemble's latents and classes, {ours}; this one knows {theirs}: train it with "
            "this run's codec and its number of classes"
        )


def _with(pipeline: DDMPipeline, experts: Mapping[int, ExpertModel], router: RouterModel | None) -> DDMPipeline:
    return replace(pipeline, ensemble=replace(pipeline.ensemble, experts=experts, router=router))


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
