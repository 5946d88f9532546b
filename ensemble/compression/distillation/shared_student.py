"""Distill all experts and their router into one shared student, which replaces the ensemble."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ddm_core.artifacts import Workspace, atomic_folder, read_json, write_json
from ensemble.compression.config import DistillConfig
from ensemble.compression.distillation.config import MMDConfig, SiDConfig, WarmedConfig
from ensemble.compression.distillation.consistency import train_consistency_student
from ensemble.compression.distillation.mean_flow import train_mean_flow_student
from ensemble.compression.distillation.mmd import finetune_mmd
from ensemble.compression.distillation.scm import train_scm_student
from ensemble.compression.distillation.sid import distill_sid_student
from ensemble.compression.distillation.sign import train_sign_student
from ensemble.compression.distillation.teacher import Teacher, build_ensemble_teacher, router_flops
from ensemble.compression.method import CompressionContext, EnsembleResult, ExpertResult, StageError
from ensemble.pipeline import EnsemblePipeline
from experts.expert import Expert, network_flops
from experts.training.latent_dataset import LatentDataset

SHARED_WARMUP = "common.json"
TEACHER_METHODS: Mapping[str, Callable[[Expert, Teacher, float, LatentDataset, Any, Workspace], ExpertResult]] = {
    "consistency": train_consistency_student,
    "mean_flow": train_mean_flow_student,
    "scm": train_scm_student,
    "sign": train_sign_student,
}
"""Methods that train a student on data with a teacher, by name."""


def distill_shared_student(config: DistillConfig, context: CompressionContext) -> EnsembleResult:
    """Train one student with all experts as its teacher, on the latents of all clusters.

    It starts from the parameters of the first expert. Raises `StageError` if an expert is missing, and what the
    methods raise.
    """
    context.check_noise_schedules(config.method)
    experts = context.load_single_networks(config.method)
    start = replace(next(iter(experts.values())), cluster_id=0)
    if start.few_step is not None:
        raise StageError(
            "a shared student needs experts that can be evaluated at any t, and these are few-step students; leave out "
            "the stage before"
        )
    teacher_flops = sum(network_flops(expert.model, expert.latent_shape) for expert in experts.values())
    result = _distill(start, teacher_flops, config, context)
    return EnsembleResult(
        experts={0: result.expert}, modules=1, flops=result.flops, details=result.details, keeps_router=False
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedWarmup:
    """A shared student, the network that it was trained from, and the FLOPs."""

    student: nn.Module
    start: nn.Module
    flops: float

    def start_of(self, expert: Expert, config: WarmedConfig) -> nn.Module:
        """Return the network from which an expert's student starts."""
        if isinstance(config, SiDConfig) or config.shared_start == "student":
            return self.student
        return add_change(expert.model, self.student, self.start)


def add_change(model: nn.Module, trained: nn.Module, start: nn.Module) -> nn.Module:
    """Return a copy of `model` with every parameter W + trained - start (arXiv:2402.00769, fusion of weights)."""
    fused, pairs = deepcopy(model), zip(trained.parameters(), start.parameters(), strict=True)
    with torch.no_grad():
        for parameter, (after, before) in zip(fused.parameters(), pairs, strict=True):
            parameter.add_(after - before)
    return fused


def train_shared_warmup(config: WarmedConfig, context: CompressionContext) -> SharedWarmup:
    """Train the shared student from which every expert's student starts.

    A restarted stage loads it from the scratch folder.
    """
    finished = context.workspace.scratch / "common"
    experts = context.load_single_networks(config.method).values()
    if not finished.exists():
        training = replace(config.training, steps=config.shared_warmup_steps)
        warmup_context = replace(context, workspace=context.workspace.part("common_work"))
        kinds = {(expert.prediction, type(expert.model), _parameter_shapes(expert)) for expert in experts}
        if len(kinds) > 1:
            raise StageError(
                "a shared warm-up needs experts of one architecture, and these differ; set "
                "distill.shared_warmup_steps=0"
            )
        settings: WarmedConfig = (
            replace(config, shared_warmup_steps=0, training=training)
            if isinstance(config, SiDConfig)
            else replace(config, shared_warmup_steps=0, shared_start="student", adapter_rank=None, training=training)
        )
        result = distill_shared_student(settings, warmup_context)
        with atomic_folder(finished) as temporary:
            result.experts[0].save(temporary)
            write_json(temporary / SHARED_WARMUP, {"flops": result.flops})
    return SharedWarmup(
        student=Expert.load(finished).model,
        start=next(iter(experts)).model,
        flops=float(read_json(finished / SHARED_WARMUP)["flops"]),
    )


def _parameter_shapes(expert: Expert) -> tuple[torch.Size, ...]:
    return tuple(parameter.shape for parameter in expert.model.parameters())


def _distill(start: Expert, teacher_flops: float, config: DistillConfig, context: CompressionContext) -> ExpertResult:
    """Run the configured method with the ensemble as teacher; MMD needs only data."""
    latents, workspace = context.data.load_all_latents(context.workspace), context.workspace
    pipeline = EnsemblePipeline.from_pretrained(context.ensemble)
    teacher = build_ensemble_teacher(pipeline.ensemble, config.training.device)
    if isinstance(config, MMDConfig):
        return finetune_mmd(start, latents, config, workspace)
    teacher_flops += router_flops(teacher, start.latent_shape)
    if isinstance(config, SiDConfig):
        return distill_sid_student(start, start.model, teacher, teacher_flops, latents, config, workspace)
    return TEACHER_METHODS[config.method](start, teacher, teacher_flops, latents, config, workspace)
