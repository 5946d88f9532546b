"""One student of all experts in the place of the ensemble: no router, no clusters, one network."""

from dataclasses import replace

import torch
from torch import nn

from ddm_core.artifacts import read_json, replaced_folder, write_json
from ensemble.compression.config import DistillConfig
from ensemble.compression.distillation.config import ConsistencyConfig, SiDConfig
from ensemble.compression.distillation.consistency import consistency_of
from ensemble.compression.distillation.mmd import mmd
from ensemble.compression.distillation.sid import sid_of
from ensemble.compression.distillation.teacher import mixture_of, router_flops
from ensemble.compression.method import Given, Outcome, StageError, Together
from ensemble.pipeline import DDMPipeline
from experts.expert import Expert, network_flops

COMMON = "common.json"


def dense_student(config: DistillConfig, given: Given) -> Together:
    """A student that begins with the first expert's parameters and learns from all, on the latents of all clusters.

    Raises `StageError` if an expert is missing, and what the methods raise.
    """
    given.check_paths(config.method)
    experts = given.experts(config.method)
    start = replace(next(iter(experts.values())), cluster_id=0)
    if start.course is not None:
        raise StageError("one student of all learns from experts that are asked at any t; leave out what came before")
    row = sum(network_flops(one.model, one.latent_shape) for one in experts.values())
    outcome = _distilled(start, row, config, given)
    return Together(
        experts={0: outcome.expert}, modules=1, flops=outcome.flops, details=outcome.details, keeps_router=False
    )


def common_start(config: SiDConfig, given: Given) -> tuple[nn.Module, float]:
    """What every expert's own student begins with, one of all experts, and the FLOPs of it; kept between attempts."""
    kept = given.workspace.scratch / "common"
    if not kept.exists():
        training = replace(config.training, steps=config.common_steps)
        part = replace(given, workspace=given.workspace.part("common_work"))
        kinds = {(one.prediction, type(one.model), _sizes(one)) for one in given.experts(config.method).values()}
        if len(kinds) > 1:
            raise StageError(
                "a common student is one network, and these experts differ in theirs; set distill.common_steps=0"
            )
        made = dense_student(replace(config, common_steps=0, training=training), part)
        with replaced_folder(kept) as temporary:
            made.experts[0].save(temporary)
            write_json(temporary / COMMON, {"flops": made.flops})
    return Expert.load(kept).model, float(read_json(kept / COMMON)["flops"])


def _sizes(expert: Expert) -> tuple[torch.Size, ...]:
    return tuple(parameter.shape for parameter in expert.model.parameters())


def _distilled(start: Expert, row: float, config: DistillConfig, given: Given) -> Outcome:
    latents, space = given.data.all_latents(given.workspace), given.workspace
    teacher = mixture_of(DDMPipeline.from_pretrained(given.ensemble).ensemble, config.training.device)
    if not isinstance(config, SiDConfig | ConsistencyConfig):
        return mmd(start, latents, config, space)
    row += router_flops(teacher, start.latent_shape)
    if isinstance(config, SiDConfig):
        return sid_of(start, start.model, teacher, row, latents, config, space)
    return consistency_of(start, teacher, row, latents, config, space)
