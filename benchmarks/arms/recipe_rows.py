"""Rows of `benchmarks.papers` on students that project, guide in one call, and take adapters; on digits.

Distances are squared MMDs of samples to held-out digits of the same classes, over that of the expert in 50 Euler steps.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from sklearn.svm import SVC
from torch import Tensor, nn

from benchmarks.arms.few_step_rows import TRAINING, distance_of
from benchmarks.arms.paper_networks import select_digits, train_digits
from benchmarks.arms.paper_row import PaperRow
from ddm_core.artifacts import Workspace
from ensemble.compression.distillation.config import ConsistencyConfig, SignConfig, SpeedUpNetConfig
from ensemble.compression.distillation.consistency import train_consistency
from ensemble.compression.distillation.mmd import FINE, median_kernel, squared_mmd
from ensemble.compression.distillation.sign import project, train_sign
from ensemble.compression.distillation.speedup import train_speedup
from ensemble.solvers import euler, make_noise, sample_few_step, uniform_times
from experts.compressed.distillation.guidance_branch import copy_branches, guidance_branches
from experts.conditions.condition import Condition
from experts.config import TrainingConfig
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.lora import Lora, add_lora, add_new_lora, extract_lora
from experts.training.latent_dataset import LatentDataset
from experts.training.lora_training import choose_layers
from experts.training.loss import expert_loss
from experts.training.trainer import fit
from experts.types import Latents, Times

REPEATS, STEPS = 4, 20
NOISED = 0.15
"""t of the corrupted digits."""
SIGN = SignConfig(training=replace(TRAINING, t_mean=0.7), flow_steps=4)
GUIDANCE, FEW_STEPS = 3.0, 4
TUNING = TrainingConfig(steps=300, batch_size=64, lr=2e-3, warmup_steps=20, checkpoint_every=10**6)
RANK = 8


@torch.inference_mode()
def describe_projection(student: Expert) -> dict[str, float]:
    """Return the distances of samples after one and two calls, how far the second moves them, and errors on digits."""
    held_out = select_digits("dit", held_out=True)
    clean, condition = held_out.clean, held_out.condition(torch.arange(len(held_out)))
    real, classes = clean.flatten(1), (condition.class_id, condition.class_id)
    kernel, totals = median_kernel("rbf", real, FINE), dict.fromkeys(("one", "twice", "moved"), 0.0)
    for repeat in range(REPEATS):
        seeds = range(repeat * len(real), (repeat + 1) * len(real))
        once = project(student, make_noise(seeds, student.latent_shape), condition)
        again = project(student, once, condition)
        totals["one"] += float(squared_mmd(once.flatten(1), real, kernel, classes)) / REPEATS
        totals["twice"] += float(squared_mmd(again.flatten(1), real, kernel, classes)) / REPEATS
        totals["moved"] += float((again - once).square().sum() / once.square().sum()) / REPEATS
    noise = make_noise(range(10**6, 10**6 + len(real)), student.latent_shape)
    noised = RECTIFIED_FLOW.add_noise(clean, noise, torch.full((len(clean),), NOISED))
    hole = clean.clone()
    hole[..., 2:5, 2:5] = 0
    for name, corrupted in {"noised": noised, "hole": hole}.items():
        error = (project(student, corrupted, condition) - clean).square().mean()
        totals[name] = float(error / (corrupted - clean).square().mean())
    return totals


def measure_sign(folder: Path) -> PaperRow:
    """Distill an idempotent student, and one by its score and flow terms alone."""
    teacher, data = train_digits("dit", folder)
    configs = {"idempotent": SIGN, "score and flow alone": replace(SIGN, data_weight=0, idempotence_weight=0)}
    figures = {
        name: describe_projection(train_sign(teacher, data, config, Workspace.at(folder / f"sign {name}")).network)
        for name, config in configs.items()
    }
    whole, (ours, control) = distance_of(teacher, 50, "euler"), figures.values()
    return PaperRow(
        paper="SIGN (2509.21470)",
        says="one step is idempotent: it projects noise and corrupted pictures alike, and may be applied again",
        file="ensemble/compression/distillation/sign.py",
        command="ddm compress RUN distill=sign",
        criterion=(
            "one call's MMD ≤ 1.2 × without the terms, two ≤ 1.05 × one; the second moves ≤ .02 and ≤ .1 × without; "
            "error of noised digits ≤ .7 × the input's, without the terms more than it"
        ),
        ours="; ".join(_describe_projection(name, values, whole) for name, values in figures.items()),
        theirs="CIFAR-10 FID about 11 (a reviewer)",
        differs="weights of our own, as the paper's are not public; corruption is noise, a hole is new to it",
        holds=ours["one"] <= 1.2 * control["one"]
        and ours["twice"] <= 1.05 * ours["one"]
        and ours["moved"] <= min(0.02, 0.1 * control["moved"])
        and ours["noised"] <= 0.7
        and control["noised"] > 1,
    )


def _describe_projection(name: str, values: Mapping[str, float], whole: float) -> str:
    return (
        f"{name}: {values['one'] / whole:.2f} × 50 steps, twice {values['twice'] / whole:.2f}, moved "
        f"{values['moved']:.4f}, noised {values['noised']:.2f}, hole {values['hole']:.2f} × input"
    )


def tune(expert: Expert, data: LatentDataset, workspace: Workspace, rank: int = 0) -> nn.Module:
    """Return the network after training on other data, all of it or a new adapter of this rank."""
    network = deepcopy(expert.model)
    if rank:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            add_new_lora(network, choose_layers(network), rank)
    loss = partial(expert_loss, prediction=expert.prediction, noise_schedule=expert.noise_schedule)
    return fit(network, loss, data, TUNING, workspace).model


def select_bold_digits(kind: str) -> LatentDataset:
    """Return the digits of training with broader strokes: every pixel is the brightest of its neighbors."""
    data = select_digits(kind, held_out=False)
    return replace(data, clean=nn.functional.max_pool2d(data.clean, 2, stride=1, padding=1)[..., 1:, 1:].contiguous())


@torch.inference_mode()
def sample_euler(expert: Expert, condition: Condition, guidance: float, calls: int, steps: int = STEPS) -> Latents:
    """Return samples by Euler's method with guidance in one or two calls a step; 1 is none."""
    null = Condition.null(len(condition))

    def velocity(noised: Latents, t: Times) -> Latents:
        if calls == 1:
            return expert.velocity(noised, t, condition if guidance == 1 else condition.guided(guidance))
        away = expert.velocity(noised, t, null)
        return away + guidance * (expert.velocity(noised, t, condition) - away)

    return euler(velocity, make_noise(range(len(condition)), expert.latent_shape), uniform_times(steps))


def measure_speedup(folder: Path) -> PaperRow:
    """Compare guided samples of one call a step with those of two, of an expert, and of a fine-tuned one."""
    expert, data = train_digits("dit", folder)
    config = SpeedUpNetConfig(training=replace(TUNING, steps=400, batch_size=32))
    branched = train_speedup(expert, data, config, Workspace.at(folder / "speedup")).network
    tuned = replace(expert, model=tune(expert, select_bold_digits("dit"), Workspace.at(folder / "bold")))
    classifier = SVC().fit(data.clean.flatten(1).numpy(), data.class_id.numpy())
    condition = Condition.of_classes([k % 10 for k in range(300)])

    def wrong(samples: Tensor) -> float:
        guesses = torch.from_numpy(classifier.predict(samples.flatten(1).numpy()))
        return float((guesses != condition.class_id).double().mean())

    distances, networks = dict[str, float](), {"own": (expert, branched.model), "fine-tuned": (tuned, branched.model)}
    networks["random branches"] = tuned, shuffle_branches(branched.model)
    errors = dict[str, float]()
    for name, (plain, branches) in networks.items():
        one = replace(plain, model=copy_branches(branches, deepcopy(plain.model)))
        guided, two = sample_euler(one, condition, GUIDANCE, 1), sample_euler(plain, condition, GUIDANCE, 2)
        without = sample_euler(plain, condition, 1.0, 1)
        distances[name] = float((guided - two).norm() / (without - two).norm())
        if name == "own":
            errors = {"one call": wrong(guided), "two": wrong(two), "unguided": wrong(without)}
    return PaperRow(
        paper="SpeedUpNet (2312.08887)",
        says="a plug-in for the negative prompt guides in one call, and fits fine-tuned models that did not train it",
        file="ensemble/compression/distillation/speedup.py",
        command="ddm compress RUN distill=speedup",
        criterion=(
            "share of samples of a wrong class: one call ≤ 1.1 × two, unguided more; distance to the samples of two "
            "calls ≤ .5 × that of unguided ones, also in a fine-tuned expert; random branches > 1"
        ),
        ours=(
            f"wrong at scale 3: {', '.join(f'{name} {value:.3f}' for name, value in errors.items())}; distance "
            f"{', '.join(f'{name} {value:.2f}' for name, value in distances.items())}"
        ),
        theirs="more than 10 × faster than 25 steps of DPM-Solver++, with fewer steps as well",
        differs="classes; a branch for the negative condition beside every layer",
        holds=errors["one call"] <= 1.1 * errors["two"] < 1.1 * errors["unguided"]
        and max(distances["own"], distances["fine-tuned"]) <= 0.5
        and distances["random branches"] > 1,
    )


def measure_speedup_in_few_steps(folder: Path) -> PaperRow:
    """Compare guided samples of few calls with those of many steps of two calls, with and without consistency."""
    expert, data = train_digits("dit", folder)
    condition = Condition.of_classes([k % 10 for k in range(300)])
    exact = sample_euler(expert, condition, GUIDANCE, 2)
    as_long, as_many = (sample_euler(expert, condition, GUIDANCE, 2, steps=n) for n in (FEW_STEPS // 2, FEW_STEPS))
    distances, unit = {"as many steps": float((as_many - exact).norm())}, float((as_long - exact).norm())
    for name, steps in (("consistent", FEW_STEPS), ("guidance alone", 0)):
        config = SpeedUpNetConfig(training=replace(TUNING, steps=400, batch_size=32), steps=steps, substeps=5)
        trained = train_speedup(expert, data, config, Workspace.at(folder / f"speedup, {name}")).network
        samples = sample_euler(trained, condition, GUIDANCE, 1, steps=FEW_STEPS)
        distances[name] = float((samples - exact).norm())
    return PaperRow(
        paper="SpeedUpNet (2312.08887), few steps",
        says="consistency over several steps lets the plug-in take few steps of one call each",
        file="ensemble/compression/distillation/speedup.py",
        command=f"ddm compress RUN distill=speedup distill.steps={FEW_STEPS}",
        criterion=(
            f"distance to guided samples of {STEPS} steps in {2 * STEPS} calls: {FEW_STEPS} calls ≤ .7 × that of as "
            f"many calls, two a step, and ≤ that of as many steps; without consistency: more than the latter"
        ),
        ours=f"over as many calls: {', '.join(f'{name} {value / unit:.2f}' for name, value in distances.items())}",
        theirs="4 steps in place of 25 of DPM-Solver++",
        differs="classes; Euler's method; 400 training steps, target in 5 steps for each of ours",
        holds=distances["consistent"] <= min(0.7 * unit, distances["as many steps"]) < distances["guidance alone"],
    )


def shuffle_branches(model: nn.Module) -> nn.Module:
    """Return a copy of a network whose branches end in a random order of their own last weights."""
    shuffled, generator = deepcopy(model), torch.Generator().manual_seed(0)
    for branch in guidance_branches(shuffled).values():
        weight = branch.outer.weight
        weight.data = weight.data.flatten()[torch.randperm(weight.numel(), generator=generator)].reshape(weight.shape)
    return shuffled


@torch.inference_mode()
def mean_ink(student: Expert, lora: Lora | None) -> float:
    """Return the mean pixel of samples by a few-step schedule, with an adapter or without."""
    if student.few_step is None:
        raise ValueError("the samples here follow a few-step schedule; give the expert one")
    model = deepcopy(student.model)
    if lora is not None:
        add_lora(model, lora, "concept")
    expert, condition = replace(student, model=model), Condition.of_classes([k % 10 for k in range(300)])
    seeds = range(len(condition))
    samples = sample_few_step(
        lambda noised, t: expert.velocity(noised, t, condition),
        make_noise(seeds, expert.latent_shape),
        student.few_step,
        RECTIFIED_FLOW,
        lambda step: make_noise(seeds, expert.latent_shape, 1 + step),
    )
    return float(samples.mean())


def measure_control(folder: Path) -> PaperRow:
    """Train an adapter of bold strokes on the base, and compare how far it moves the base and a student."""
    expert, data = train_digits("dit", folder)
    lora = extract_lora(tune(expert, select_bold_digits("dit"), Workspace.at(folder / "concept"), RANK))
    config = ConsistencyConfig(training=TRAINING, teacher=True)
    student = train_consistency(expert, data, config, Workspace.at(folder / "student of a control")).network
    generator = torch.Generator().manual_seed(0)
    random = {
        path: replace(
            layer,
            up=layer.up.flatten()[torch.randperm(layer.up.numel(), generator=generator)].reshape(layer.up.shape),
        )
        for path, layer in lora.items()
    }
    base = replace(expert, few_step=FewStepSchedule.uniform(STEPS, "euler"))
    moved = {
        name: mean_ink(each, adapter) - mean_ink(each, None)
        for name, each, adapter in (("base", base, lora), ("student", student, lora), ("random", student, random))
    }
    return PaperRow(
        paper="Distilling Diversity and Control (2503.10637)",
        says="an adapter of one concept that was trained on the base controls the distilled model too",
        file="experts/networks/lora.py",
        command="ddm finetune RUN; ddm compress RUN distill=consistency; ddm serve RUN --adapter NAME=FOLDER",
        criterion="an adapter of bold strokes adds ≥ .8 × as much ink to the student's samples; shuffled ≤ .3 ×",
        ours=(
            f"student {moved['student'] / moved['base']:.2f} × the base's {moved['base']:.3f} in 20 steps; shuffled "
            f"{moved['random'] / moved['base']:.2f} ×"
        ),
        theirs="sliders and LoRAs keep their effect on SDXL's distilled models (no one ratio)",
        differs="a consistency student in two steps; LoRA of rank 8 in the attention of a DiT",
        holds=moved["student"] >= 0.8 * moved["base"] > 0 and abs(moved["random"]) <= 0.3 * moved["base"],
    )


ROWS: Mapping[str, Callable[[Path], PaperRow]] = {
    "sign": measure_sign,
    "speedup": measure_speedup,
    "speedup_few_steps": measure_speedup_in_few_steps,
    "control": measure_control,
}
