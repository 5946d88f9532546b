"""One student of all experts in the place of the ensemble: no router, no clusters, one network."""

from dataclasses import replace

import torch
from torch import nn

from ddm_core.artifacts import atomic_folder, read_json, write_json
from ensemble.compression.config import DistillConfig
from ensemble.compression.distillation.config import ConsistencyConfig, SiDConfig
from ensemble.compression.distillation.consistency import train_consistency_student
from ensemble.compression.distillation.mmd import finetune_mmd
from ensemble.compression.distillation.sid import distill_sid_student
from ensemble.compression.distillation.teacher import ensemble_teacher, router_flops
from ensemble.compression.method import CompressionContext, EnsembleResult, ExpertResult, StageError
from ensemble.pipeline import DDMPipeline
from experts.expert import Expert, network_flops

SHARED_WARMUP = "common.json"


def distill_shared_student(config: DistillConfig, given: CompressionContext) -> EnsembleResult:
    """A student that begins with the first expert's parameters and learns from all, on the latents of all clusters.

    Raises `StageError` if an expert is missing, and what the methods raise.
    """
    given.check_noise_schedules(config.method)
    experts = given.experts(config.method)
    start = replace(next(iter(experts.values())), cluster_id=0)
    if start.few_step is not None:
        raise StageError("one student of all learns from experts that are asked at any t; leave out what came before")
    row = sum(network_flops(one.model, one.latent_shape) for one in experts.values())
    outcome = _distilled(start, row, config, given)
    return EnsembleResult(
        experts={0: outcome.expert}, modules=1, flops=outcome.flops, details=outcome.details, keeps_router=False
    )


def shared_warmup(config: SiDConfig, given: CompressionContext) -> tuple[nn.Module, float]:
    """What every expert's own student begins with, one of all experts, and the FLOPs of it; kept between attempts."""
    kept = given.workspace.scratch / "common"
    if not kept.exists():
        training = replace(config.training, steps=config.shared_warmup_steps)
        part = replace(given, workspace=given.workspace.part("common_work"))
        kinds = {(one.prediction, type(one.model), _sizes(one)) for one in given.experts(config.method).values()}
        if len(kinds) > 1:
            raise StageError(
                "a common student is one network, and these experts differ in theirs; set distill.shared_warmup_steps=0"
            )
        made = distill_shared_student(replace(config, shared_warmup_steps=0, training=training), part)
        with atomic_folder(kept) as temporary:
            made.experts[0].save(temporary)
            write_json(temporary / SHARED_WARMUP, {"flops": made.flops})
    return Expert.load(kept).model, float(read_json(kept / SHARED_WARMUP)["flops"])


def _sizes(expert: Expert) -> tuple[torch.Size, ...]:
    return tuple(parameter.shape for parameter in expert.model.parameters())


def _distilled(start: Expert, row: float, config: DistillConfig, given: CompressionContext) -> ExpertResult:
    latents, space = given.data.all_latents(given.workspace), given.workspace
    teacher = ensemble_teacher(DDMPipeline.from_pretrained(given.ensemble).ensemble, config.training.device)
    if not isinstance(config, SiDConfig | ConsistencyConfig):
        return finetune_mmd(start, latents, config, space)
    row += router_flops(teacher, start.latent_shape)
    if isinstance(config, SiDConfig):
        return distill_sid_student(start, start.model, teacher, row, latents, config, space)
    return train_consistency_student(start, teacher, row, latents, config, space)
