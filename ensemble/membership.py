"""Remove experts from an ensemble, restore them, or add new ones; all other experts keep their ids.

A removed expert is missing: its share of the gates goes to the others. A restored expert takes the id of a missing
one. A new expert has id K and needs a router with K + 1 experts: see `router/add_remove.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ensemble.ensemble import Ensemble, RouterModel
from ensemble.pipeline import EnsemblePipeline
from ensemble.pipeline_folder import PipelineError
from experts.conditions.condition import Condition
from experts.conditions.null_text import get_null_text
from experts.expert import Expert
from experts.expert_model import ExpertModel


def remove_experts(pipeline: EnsemblePipeline, ids: Sequence[int]) -> EnsemblePipeline:
    """Return the ensemble without these experts; raise `PipelineError` if one is absent, or if none would remain."""
    present = pipeline.ensemble.experts
    if absent := sorted(set(ids) - set(present)):
        raise PipelineError(
            f"experts to remove must be among {sorted(present)}; got {absent}; name experts of the list"
        )
    remaining = {k: expert for k, expert in present.items() if k not in ids}
    if not remaining:
        raise PipelineError(f"an ensemble needs an expert; {sorted(ids)} are all of this one: leave one in it")
    return _replace_experts(pipeline, remaining, pipeline.ensemble.router)


def restore_expert(pipeline: EnsemblePipeline, expert: Expert, expert_id: int) -> EnsemblePipeline:
    """Return the ensemble with an expert under the id of a missing one, which its router covers already."""
    missing = pipeline.ensemble.missing
    if expert_id not in missing:
        missing_text = f"missing are {list(missing)}" if missing else "none is missing"
        raise PipelineError(
            f"an expert takes the place of a missing one, and {missing_text}; got place {expert_id}; pass a missing id"
        )
    _check_fit(pipeline, expert)
    experts = {**pipeline.ensemble.experts, expert_id: replace(expert, cluster_id=expert_id)}
    return _replace_experts(pipeline, experts, pipeline.ensemble.router)


def add_expert(pipeline: EnsemblePipeline, expert: Expert, router: RouterModel) -> EnsemblePipeline:
    """Return the ensemble with one more expert, of id K, and a router with K + 1 experts."""
    new_id = pipeline.ensemble.num_experts
    if router.num_experts != new_id + 1:
        raise PipelineError(
            f"the router must have the {new_id} experts and the new one; it has {router.num_experts}; "
            "add an output to the router of this ensemble"
        )
    _check_fit(pipeline, expert)
    experts = {**pipeline.ensemble.experts, new_id: replace(expert, cluster_id=new_id)}
    return _replace_experts(pipeline, experts, router)


def _check_fit(pipeline: EnsemblePipeline, expert: Expert) -> None:
    required = pipeline.codec.latent_shape, pipeline.num_classes
    shapes = expert.latent_shape, expert.num_classes
    if required != shapes:
        raise PipelineError(
            f"an expert must have the ensemble's latents and classes, {required}; this one has {shapes}: train it with "
            "this run's codec and its number of classes"
        )
    network = next(next(iter(pipeline.ensemble.experts.values())).networks())
    texts = [text and text.shape for text in map(get_null_text, (network, expert.model))]
    if texts[0] != texts[1]:
        raise PipelineError(
            f"an expert must read the ensemble's texts, of (tokens, features, pooled features) {texts[0]}; this one "
            f"has {texts[1]}: train it with --text and the folder of the ensemble"
        )


def _replace_experts(
    pipeline: EnsemblePipeline, experts: Mapping[int, ExpertModel], router: RouterModel | None
) -> EnsemblePipeline:
    return replace(pipeline, ensemble=replace(pipeline.ensemble, experts=experts, router=router))


def data_shares(ensemble: Ensemble) -> tuple[float, ...]:
    """Return each expert's share of the training samples, missing experts included."""
    if ensemble.router is None:
        return (1.0,)
    return tuple(ensemble.router.prior_logits(Condition.null(1)).softmax(-1)[0].tolist())


def missing_share(ensemble: Ensemble) -> float:
    """Return the share of the training samples whose experts are missing."""
    shares = data_shares(ensemble)
    return sum((shares[k] for k in ensemble.missing), 0.0)


def missing_warning(ensemble: Ensemble) -> str:
    """Return a sentence that names the missing experts and their share of the data; empty if none is missing."""
    missing = ensemble.missing
    if not missing:
        return ""
    ids = ", ".join(map(str, missing))
    verb = "is" if len(missing) == 1 else "are"
    return (
        f"{len(missing)} of {ensemble.num_experts} experts {verb} missing ({ids}), trained on "
        f"{100 * missing_share(ensemble):.1f} % of the data: their content is missing from the samples; gates are "
        "renormalized over the remaining experts"
    )
