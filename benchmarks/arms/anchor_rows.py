"""Row of `benchmarks.papers` on anchors under prompts: a head with a confidence in every anchor.

The text of a digit is one token of its class, so the exact shares of the anchors under a prompt are known: those of the
class. Distances are squared MMDs of samples to held-out digits of the same classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.arms.paper_networks import CLASSES, select_digits, train_digits
from benchmarks.arms.paper_row import PaperRow
from ddm_core.artifacts import Workspace
from ensemble.compression.acceleration.config import TruncateConfig
from ensemble.compression.acceleration.truncated_start import fit_anchors, train_confidence
from ensemble.compression.distillation.mmd import FINE, median_kernel, squared_mmd
from ensemble.solvers import make_noise, sample_few_step
from experts.architectures.draft_generators import PromptedAnchors
from experts.conditions.condition import Condition
from experts.config import TrainingConfig
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.types import Latents

CONFIG = TruncateConfig(training=TrainingConfig(steps=600, batch_size=128, lr=3e-3, warmup_steps=50))
START, REPEATS, DRAFT = 0.5, 4, 1000
MARGINAL = 0.01
"""Share of the cluster's shares that is added to those of a class, so that none is zero."""


def measure_prompted_anchors(folder: Path) -> PaperRow:
    """Compare the head with exact shares of each class, and with those of the whole cluster."""
    expert, data = train_digits("mmdit", folder)
    labelled, held_out = select_digits("dit", held_out=False), select_digits("mmdit", held_out=True)
    labels = select_digits("dit", held_out=True).class_id
    by_class, marginal = fit_anchors(labelled, CLASSES, CONFIG), fit_anchors(data, 0, CONFIG)
    head, _ = train_confidence(marginal, data, CONFIG, Workspace.at(folder / "head"))
    condition = held_out.condition(torch.arange(len(held_out)))
    shares = {
        "head": _confidences(head, condition),
        "exact shares": by_class.shares[labels] * (1 - MARGINAL) + marginal.shares[-1] * MARGINAL,
        "without the prompt": marginal.shares[-1].expand(len(labels), -1),
    }
    nearest = torch.cdist(held_out.clean.flatten(1), marginal.means.flatten(1)).argmin(1)
    losses = {
        name: -float((each / each.sum(1, keepdim=True)).gather(1, nearest[:, None]).log().mean())
        for name, each in shares.items()
    }
    refiner = replace(expert, few_step=FewStepSchedule.uniform(2, "euler", start=START))
    distances = {
        name: _distance(refiner, head, each, condition, held_out.clean, labels) for name, each in shares.items()
    }
    plain = replace(expert, few_step=FewStepSchedule.uniform(2, "euler"))
    whole = _distance(plain, head, None, condition, held_out.clean, labels)
    ratio = distances["head"] / distances["exact shares"]
    control = distances["without the prompt"] / distances["exact shares"]
    return PaperRow(
        paper="DiffusionDrive (2411.15139), confidence under a prompt",
        says="a head scores every anchor under the condition, trained on which one is nearest",
        file="experts/architectures/draft_generators.py",
        command="ddm compress RUN accelerate=truncate accelerate.draft=anchors",
        criterion="log loss ≤ exact + .05, MMD of two steps ≤ 1.1 × exact shares'; without the prompt: > 1.1 ×",
        ours=(
            f"log loss {', '.join(f'{name} {value:.3f}' for name, value in losses.items())}; MMD "
            f"{', '.join(f'{name} {value:.4f}' for name, value in distances.items())}; two steps from noise {whole:.4f}"
        ),
        theirs="PDMS 88.1 by the anchor of the highest confidence",
        differs="drafts are drawn by confidence; prompts of one token, whose exact shares are known",
        holds=losses["head"] <= losses["exact shares"] + 0.05 and ratio <= 1.1 < control,
    )


@torch.inference_mode()
def _confidences(head: PromptedAnchors, condition: Condition) -> torch.Tensor:
    return head.logits(condition.embedding_index(0), condition.text).sigmoid()


@torch.inference_mode()
def _distance(
    refiner: Expert,
    anchors: PromptedAnchors,
    shares: torch.Tensor | None,
    condition: Condition,
    clean: Latents,
    labels: torch.Tensor,
) -> float:
    """Return the MMD of refined drafts that are drawn by these shares; None starts from noise."""
    if refiner.few_step is None:
        raise ValueError("a refiner has a few-step schedule; this expert has none")
    real, total = clean.flatten(1), 0.0
    kernel, start = median_kernel("rbf", real, FINE), torch.full((len(real),), refiner.few_step.times[0])
    for repeat in range(REPEATS):
        seeds = range(repeat * len(real), (repeat + 1) * len(real))
        noised = make_noise(seeds, refiner.latent_shape)
        if shares is not None:
            drafts = anchors.select(make_noise(seeds, refiner.latent_shape, DRAFT), shares)
            noised = RECTIFIED_FLOW.add_noise(drafts, noised, start)
        samples = sample_few_step(
            lambda x, t: refiner.velocity(x, t, condition),
            noised,
            refiner.few_step,
            RECTIFIED_FLOW,
            lambda step, noised=noised: noised,
        )
        total += float(squared_mmd(samples.flatten(1), real, kernel, (labels, labels)))
    return total / REPEATS


ROWS: Mapping[str, Callable[[Path], PaperRow]] = {"prompted_anchors": measure_prompted_anchors}
