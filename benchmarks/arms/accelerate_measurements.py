"""Measurements for `benchmarks.accelerate`: caches, students, drafts and all of them together, against plain steps.

Each part stores its pipelines and measurements in its run folder, so that a stopped benchmark continues there.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from benchmarks.arms.compress import Arm, train_ensemble, train_start
from benchmarks.arms.compress_measurements import Measurements, Parts, flops_ratio, read_report
from benchmarks.arms.finished_run import SPACES
from ddm_core.artifacts import read_json, write_json
from ensemble.compression.acceleration.config import BaseFirstConfig, CacheConfig, HookConfig, TruncateConfig
from ensemble.compression.config import DynamicInt8Config, WeightOnlyConfig
from ensemble.compression.distillation.config import ConsistencyConfig, MMDConfig, SiDConfig
from ensemble.compression.pruning.config import LaptopConfig
from ensemble.evaluation.generate import RowFlops
from ensemble.evaluation.metrics import vendi_score
from ensemble.evaluation.scoring import Reference
from ensemble.pipeline import EnsemblePipeline
from experts.config import TrainingConfig
from experts.diffusion.few_step import FewStepSchedule
from orchestrator.pipeline.stage_configs import evaluation_config

STEPS = 50
"""Steps of the samples that everything is compared with."""
STEPS_OVERRIDES = (f"ensemble.steps={STEPS}",)

SID_TRAINING = TrainingConfig(steps=800, batch_size=64, lr=4e-4, warmup_steps=50, t_mean=0.7, t_std=1.6)
"""Training of students by score identity distillation."""
CONSISTENCY_TRAINING = TrainingConfig(steps=1000, batch_size=64, lr=5e-4, warmup_steps=50)
"""Consistency training."""
MMD_TRAINING = TrainingConfig(steps=120, batch_size=128, lr=5e-4, warmup_steps=20, clip_norm=0.5)
"""Training of a short chain of steps on its MMD."""
NUM_DISTANCE_IMAGES = 64
"""Number of images whose distance to the original's is measured where nothing is scored."""
REFINED = TruncateConfig(draft="student", steps=1, t_start=0.3)
"""One step of a student, then one of the expert from the t that is best for two."""
T_STARTS = (0.02, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
"""The t from which drafts are refined."""


@dataclass(frozen=True, kw_only=True)
class OriginalComparison:
    """Compares pipelines with the original ensemble in all its steps, from the same noise."""

    arm: Arm

    def measure_distance(self, pipeline: Path, steps: int | None = None) -> Measurements:
        """Return the relative L2 distance of some images, and the FLOPs of an image over the original's."""
        images, flops = self._sample(pipeline, steps)
        original_images, original_flops = self._original_samples
        distance = float((images - original_images).norm() / original_images.norm())
        return {"l2": distance, "flops": flops / original_flops}

    def measure_scores(self, pipeline: Path, steps: int | None = None) -> Measurements:
        """Return distance and FLOPs of all scored images, KID over the original's, precision and recall."""
        folder, original_folder = self.arm.score(pipeline, steps), self.arm.score(self.arm.original)
        scores, original_scores = (read_json(out / "scores.json") for out in (folder, original_folder))
        images, original_images = (np.load(out / "images.npy").astype(np.float64) for out in (folder, original_folder))
        features, original_features = (result["spaces"][SPACES[1]] for result in (scores, original_scores))
        return {
            "kid": features["kid"] / original_features["kid"],
            "pixels": scores["spaces"][SPACES[0]]["fd"] / original_scores["spaces"][SPACES[0]]["fd"],
            "precision": features["precision"],
            "recall": features["recall"],
            "flops": scores["flops_per_image"] / original_scores["flops_per_image"],
            "l2": float(np.linalg.norm(images - original_images) / np.linalg.norm(original_images)),
        }

    def measure_scores_and_variety(self, pipeline: Path) -> Measurements:
        """Return `measure_scores` and the Vendi score."""
        reference = Reference.load(self.arm.artifact_folder("reference"), evaluation_config(self.arm.config))
        images = np.load(self.arm.score(pipeline) / "images.npy")
        features = reference.extract(images).spaces[SPACES[1]]
        return self.measure_scores(pipeline) | {"vendi": vendi_score(features)}

    def measure_against_fewer_steps(self, pipeline: Path, *, is_scored: bool = False) -> Measurements:
        """Return the measurements of a pipeline, and of the original in as many steps as cost the same FLOPs."""
        measure = self.measure_scores if is_scored else self.measure_distance
        measurements = measure(pipeline)
        steps = max(1, round(STEPS * measurements["flops"]))
        return measurements | {"steps": steps, "fewer": measure(self.arm.original, steps)}

    def measure_costs(self, pipeline: Path) -> Measurements:
        """Return `measure_scores`, bytes and processor time over the original's.

        The time is that of a complete batch, which eight experts share.
        """
        report, batch_size = read_report(pipeline), self.arm.config.ensemble.batch_size
        return self.measure_scores(pipeline) | {
            "bytes": report.bytes_after / report.bytes_before,
            "cpu": self.arm.time_cpu(pipeline, images=batch_size).ratio,
        }

    @cached_property
    def _original_samples(self) -> tuple[Tensor, float]:
        return self._sample(self.arm.original, None)

    def _sample(self, folder: Path, steps: int | None) -> tuple[Tensor, float]:
        pipeline, sampling = EnsemblePipeline.from_pretrained(folder), self.arm.config.ensemble
        if steps is not None:
            sampling = replace(sampling, steps=steps)
        samples = pipeline(range(NUM_DISTANCE_IMAGES), sampling)
        return samples.images.double(), RowFlops.measure(pipeline).times(samples.calls)


SCORED_CACHES = ("interval 3", "interval 3, order 1")
"""DeepCache as published, and with extrapolation by differences of cached features."""


def unet_caches(seed: int, folder: Path) -> Measurements:
    """Measure DeepCache on the U-Net that all experts start from."""
    arm = train_start("unet", seed, folder, STEPS_OVERRIDES)
    comparison, deepcache = OriginalComparison(arm=arm), CacheConfig(policy="deepcache")
    caches = {
        "interval 2": replace(deepcache, interval=2),
        "interval 3": deepcache,
        "interval 5": replace(deepcache, interval=5),
        "interval 3, closer together at the clean end": replace(deepcache, center=1.0),
        "interval 3, closer together at the noisy end": replace(deepcache, center=0.0),
        "interval 3, order 1": replace(deepcache, order=1),
        "interval 5, order 1": replace(deepcache, interval=5, order=1),
    }
    pipelines = {
        name: arm.compress(f"fast-deep-{number}", cache) for number, (name, cache) in enumerate(caches.items())
    }
    measurements: Measurements = {
        name: comparison.measure_against_fewer_steps(pipeline, is_scored=name in SCORED_CACHES)
        for name, pipeline in pipelines.items()
    }
    interval_1 = arm.compress("fast-deep-exact", replace(deepcache, interval=1))
    measurements["interval 1"] = read_report(interval_1).relative_l2
    measurements["cpu"] = arm.time_cpu(pipelines["interval 3"]).ratio
    return measurements


def transformer_caches(seed: int, folder: Path) -> Measurements:
    """Measure this project's and diffusers' caches for transformers, at about a third of the FLOPs."""
    arm = train_start("dit", seed, folder, STEPS_OVERRIDES)
    comparison = OriginalComparison(arm=arm)
    caches: Mapping[str, CacheConfig | HookConfig] = {
        "reuse, interval 4": CacheConfig(interval=4),
        "differences of order 1, interval 4": CacheConfig(interval=4, order=1),
        "differences of order 2, interval 4": CacheConfig(interval=4, order=2),
        "whole blocks, order 1, interval 4": CacheConfig(interval=4, order=1, level="block"),
        "adaptive, without union, interval 4": CacheConfig(policy="adaptive", interval=4, bubbling=0),
        "adaptive, without union, order 1, interval 4": CacheConfig(policy="adaptive", interval=4, bubbling=0, order=1),
        "one adaptive schedule for all, interval 4": CacheConfig(policy="unified", interval=4),
        "TaylorSeer (diffusers), order 1, interval 4": HookConfig(interval=4, order=1),
        "TaylorSeer (diffusers), order 2, interval 4": HookConfig(interval=4, order=2),
        "first block (diffusers)": HookConfig(hook="first_block", threshold=0.25),
        "MagCache (diffusers)": HookConfig(hook="mag", interval=5, threshold=0.5),
        "pyramid attention (diffusers)": HookConfig(hook="pyramid", interval=4),
    }
    pipelines = {
        name: arm.compress(f"fast-cache-{number}", cache) for number, (name, cache) in enumerate(caches.items())
    }
    measurements: Measurements = {
        name: comparison.measure_against_fewer_steps(pipeline) for name, pipeline in pipelines.items()
    }
    cheap = [name for name in pipelines if 1 / measurements[name]["flops"] >= 3.3]
    best = min(cheap, key=lambda name: measurements[name]["l2"])
    scored = comparison.measure_against_fewer_steps(pipelines[best], is_scored=True)
    measurements |= {"best": best, "of the best": scored}
    measurements["cpu"] = arm.time_cpu(pipelines[best]).ratio
    for interval in (2, 3, 5, 10):
        for bubbling in (0, 3):
            cache = CacheConfig(policy="adaptive", interval=interval, bubbling=bubbling)
            pipeline = arm.compress(f"fast-union-{interval}-{bubbling}", cache)
            distance = read_report(pipeline).relative_l2
            measurements[f"union {interval} {bubbling}"] = {"l2": distance, "flops": flops_ratio(pipeline)}
    return measurements


def routes(seed: int, folder: Path) -> Measurements:
    """Measure cache schedules per expert against one schedule for all, on eight transformers."""
    arm = train_ensemble("small", seed, folder, STEPS_OVERRIDES)
    measurements = {}
    for order in (0, 1):
        for is_route_aware in (True, False):
            cache = CacheConfig(
                policy="adaptive", interval=4, order=order, bubbling=0, route_aware=is_route_aware, rows=32
            )
            pipeline = arm.compress(f"fast-route-{order}-{is_route_aware}", cache)
            key = f"order {order}, {'own' if is_route_aware else 'shared'}"
            measurements[key] = OriginalComparison(arm=arm).measure_scores(pipeline)
    return measurements


STUDENTS: Mapping[str, SiDConfig | ConsistencyConfig | MMDConfig] = {
    "SiD": SiDConfig(training=SID_TRAINING),
    "consistency, from data": ConsistencyConfig(training=CONSISTENCY_TRAINING),
    "consistency, from the expert": ConsistencyConfig(training=CONSISTENCY_TRAINING, teacher=True),
    "MMD": MMDConfig(training=MMD_TRAINING),
}


def students(seed: int, folder: Path) -> Measurements:
    """Measure students of one, two and four steps against as many plain steps; alone, base-first and refined."""
    arm = train_start("small", seed, folder, STEPS_OVERRIDES)
    comparison = OriginalComparison(arm=arm)
    pipelines = {(name, steps): distill_student(arm, name, steps) for name in STUDENTS for steps in (1, 2, 4)}
    measurements: Measurements = {
        f"{name}, {steps}": comparison.measure_scores_and_variety(pipeline)
        for (name, steps), pipeline in pipelines.items()
    }
    measurements |= {f"plain, {steps}": comparison.measure_scores(arm.original, steps) for steps in (1, 2, 4, 8, 16)}
    measurements["whole"] = comparison.measure_scores_and_variety(arm.original)
    for steps in (2, 4):
        best = _best_student(measurements, steps)
        for extra in (0, 1):
            base_first = BaseFirstConfig(base_steps=1 + extra)
            pipeline = arm.compress(f"fast-first-{steps}-{extra}", base_first, pipelines[best, steps])
            scores = comparison.measure_scores_and_variety(pipeline)
            measurements[f"base first, {steps} + {extra}"] = scores | {"student": best}
    best = _best_student(measurements, 1)
    refined = arm.compress("fast-refined", REFINED, pipelines[best, 1])
    measurements["refined, 1 + 1"] = comparison.measure_scores_and_variety(refined) | {"student": best}
    return measurements | {"draft of the student": best} | measure_drafts(comparison, pipelines[best, 1])


def _best_student(measurements: Measurements, steps: int) -> str:
    return min(STUDENTS, key=lambda name: float(measurements[f"{name}, {steps}"]["kid"]))


LATE_STUDENT = SiDConfig(steps=1, start=0.8, training=replace(SID_TRAINING, steps=1600))
"""A student that starts from weaker noise and trains for twice as many steps."""
LATE_NAME = f"SiD from t = {LATE_STUDENT.start}"


def late_students(seed: int, folder: Path) -> Measurements:
    """Measure a student that starts below t = 1 against one plain step; alone and refined by its expert."""
    arm = train_start("small", seed, folder, STEPS_OVERRIDES)
    comparison, student = OriginalComparison(arm=arm), arm.compress("fast-late", LATE_STUDENT)
    measurements: Measurements = {
        f"{LATE_NAME}, 1": comparison.measure_scores_and_variety(student),
        "whole": comparison.measure_scores_and_variety(arm.original),
    }
    measurements |= {f"plain, {steps}": comparison.measure_scores(arm.original, steps) for steps in (1, 2)}
    refined = arm.compress("fast-late-refined", REFINED, student)
    return measurements | {"refined, 1 + 1": comparison.measure_scores_and_variety(refined) | {"student": LATE_NAME}}


def distill_student(arm: Arm, name: str, steps: int) -> Path:
    """Distill a student; consistency students share one network, and only their few-step schedules differ."""
    number, method = list(STUDENTS).index(name), STUDENTS[name]
    if not isinstance(method, ConsistencyConfig):
        return arm.compress(f"fast-student-{number}-{steps}", replace(method, steps=steps))
    trained = arm.compress(f"fast-student-{number}", method)
    few_step = FewStepSchedule.uniform(steps, "renoise", is_distilled=True)
    return copy_with_schedule(arm, trained, f"fast-student-{number}-{steps}", "expert_*/expert.json", few_step)


def copy_with_schedule(arm: Arm, pipeline: Path, name: str, pattern: str, few_step: FewStepSchedule) -> Path:
    """Copy a pipeline and set the few-step schedule in the files that match `pattern`."""
    out = arm.extra_folder(name)
    if not out.exists():
        shutil.copytree(pipeline, out)
        for file in out.glob(pattern):
            write_json(file, read_json(file) | {"few_step": few_step})
    return out


def measure_drafts(comparison: OriginalComparison, student: Path) -> Measurements:
    """Measure truncated sampling in two steps, by draft and t_start; the search by MMD chooses one more t_start."""
    arm, measurements = comparison.arm, {}
    for draft in ("anchors", "autoregressive", "expert", "student"):
        truncate = TruncateConfig(draft=draft)
        searched = arm.compress(f"fast-draft-{draft}", truncate, student if draft == "student" else arm.original)
        measurements[f"draft {draft}"] = comparison.measure_scores(searched)
        for t in T_STARTS:
            few_step = FewStepSchedule.uniform(truncate.steps, "euler", start=t)
            pipeline = copy_with_schedule(
                arm, searched, f"fast-draft-{draft}-{t}", "expert_*/refiner/expert.json", few_step
            )
            measurements[f"draft {draft} at {t}"] = comparison.measure_scores(pipeline)
    return measurements


def everything(seed: int, folder: Path) -> Measurements:
    """Measure eight transformers: distilled, pruned, in eight bits; all students start from one shared student."""
    arm = train_ensemble("small", seed, folder, STEPS_OVERRIDES)
    comparison = OriginalComparison(arm=arm)
    measurements: Measurements = {"whole": comparison.measure_scores(arm.original)}
    measurements |= {f"plain, {steps}": comparison.measure_scores(arm.original, steps) for steps in (2, 4, 8, 16)}
    distilling = SiDConfig(steps=1, training=replace(SID_TRAINING, steps=120), shared_warmup_steps=200)
    pruning = LaptopConfig(ratio=0.1, finetune=TrainingConfig(steps=200, batch_size=32, lr=2e-4, warmup_steps=20))
    student = arm.compress("fast-all-1", distilling)
    refined = arm.compress("fast-all-1-refined", REFINED, student)
    pruned = arm.compress("fast-all-1-pruned", pruning, refined)
    name = "distilled in 1, refined in 1"
    pipelines = {
        name: refined,
        f"{name}, pruned": pruned,
        f"{name}, pruned, 8 bits": arm.compress("fast-all-1-pruned-8", DynamicInt8Config(), pruned),
        f"{name}, pruned, weights in 8 bits": arm.compress("fast-all-1-pruned-w8", WeightOnlyConfig(), pruned),
    }
    measurements |= {title: comparison.measure_costs(pipeline) for title, pipeline in pipelines.items()}
    cached = arm.compress("fast-all-cached", CacheConfig(interval=4, order=1))
    measurements["cached"] = comparison.measure_costs(cached)
    cached_int8 = arm.compress("fast-all-cached-8", DynamicInt8Config(), cached)
    measurements["cached, 8 bits"] = comparison.measure_costs(cached_int8)
    return measurements


PARTS: Parts = {
    "unet_caches": unet_caches,
    "transformer_caches": transformer_caches,
    "routes": routes,
    "students": students,
    "late_students": late_students,
    "everything": everything,
}
