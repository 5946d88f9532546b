"""What `benchmarks.accelerate` measures: caches, students, drafts and all of them together, each beside plain steps.

Each part keeps what it has made and measured in its run folder, so that a stopped benchmark goes on where it was.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from benchmarks.compress_arms import Arm, start_of, train
from benchmarks.compress_found import Found, Parts, compared
from benchmarks.finished_run import SPACES
from ddm_core.artifacts import read_json, write_json
from ensemble.compression.acceleration.config import BaseFirstConfig, CacheConfig, HookConfig, TruncateConfig
from ensemble.compression.config import DynamicInt8Config, WeightOnlyConfig
from ensemble.compression.distillation.config import ConsistencyConfig, MMDConfig, SiDConfig
from ensemble.compression.pruning.config import LaptopConfig
from ensemble.evaluation.generate import RowFlops
from ensemble.evaluation.metrics import vendi_score
from ensemble.evaluation.scoring import Reference
from ensemble.pipeline import DDMPipeline
from experts.config import TrainingConfig
from experts.diffusion.few_step import FewStepSchedule
from orchestrator.pipeline.graph import plain_evaluation

STEPS = 50
"""Of the samples that everything is compared with."""
MORE = (f"ensemble.steps={STEPS}",)

LEARNING = TrainingConfig(steps=800, batch_size=64, lr=4e-4, warmup_steps=50, t_mean=0.7, t_std=1.6)
"""How students learn by score identity distillation."""
EVEN = TrainingConfig(steps=1000, batch_size=64, lr=5e-4, warmup_steps=50)
"""How they learn to be consistent."""
CHAIN = TrainingConfig(steps=120, batch_size=128, lr=5e-4, warmup_steps=20, clip_norm=0.5)
"""How a short chain learns by its MMD."""
NEAR = 64
"""Images whose distance to those of all steps is measured where no score is."""
REFINED = TruncateConfig(draft="student", steps=1, t_start=0.3)
"""One step of a student, and one of the expert from where two do best."""
STARTS = (0.02, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
"""The t from which drafts are refined."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Whatever is drawn, against the ensemble in all its steps from the same noise."""

    arm: Arm

    def near(self, pipeline: Path, steps: int | None = None) -> Found:
        """Relative L2 distance of some images, and FLOPs of an image over the ensemble's."""
        (images, flops), (exact, whole) = self._images(pipeline, steps), self._exact
        return {"l2": float((images - exact).norm() / exact.norm()), "flops": flops / whole}

    def of(self, pipeline: Path, steps: int | None = None) -> Found:
        """The same of as many images as are scored, KID over the ensemble's, precision and recall."""
        out, base = self.arm.scored(pipeline, steps), self.arm.scored(self.arm.whole)
        ours, theirs = (read_json(folder / "scores.json") for folder in (out, base))
        images, exact = (np.load(folder / "images.npy").astype(np.float64) for folder in (out, base))
        own, whole = (scores["spaces"][SPACES[1]] for scores in (ours, theirs))
        return {
            "kid": own["kid"] / whole["kid"],
            "pixels": ours["spaces"][SPACES[0]]["fd"] / theirs["spaces"][SPACES[0]]["fd"],
            "precision": own["precision"],
            "recall": own["recall"],
            "flops": ours["flops_per_image"] / theirs["flops_per_image"],
            "l2": float(np.linalg.norm(images - exact) / np.linalg.norm(exact)),
        }

    def varied(self, pipeline: Path) -> Found:
        """The same and the Vendi score."""
        scored = self.arm.scored(pipeline)
        real = Reference.load(self.arm.folder("reference"), plain_evaluation(self.arm.config))
        features = real.extract(np.load(scored / "images.npy")).spaces[SPACES[1]]
        return self.of(pipeline) | {"vendi": vendi_score(features)}

    def beside_fewer_steps(self, pipeline: Path, *, scored: bool = False) -> Found:
        """The same, and that of as many plain steps as cost what it costs."""
        look = self.of if scored else self.near
        found = look(pipeline)
        steps = max(1, round(STEPS * found["flops"]))
        return found | {"steps": steps, "fewer": look(self.arm.whole, steps)}

    @cached_property
    def _exact(self) -> tuple[Tensor, float]:
        return self._images(self.arm.whole, None)

    def _images(self, folder: Path, steps: int | None) -> tuple[Tensor, float]:
        own = self.arm.config.ensemble
        pipeline, sampling = DDMPipeline.from_pretrained(folder), own if steps is None else replace(own, steps=steps)
        drawn = pipeline(range(NEAR), sampling)
        return drawn.images.double(), RowFlops.of(pipeline).times(drawn.calls)


DEEP = ("interval 3", "interval 3, order 1")
"""As it was published, and going on by differences of what is kept."""


def unet_caches(seed: int, folder: Path) -> Found:
    """DeepCache on the U-Net that all experts begin with."""
    arm = start_of("unet", seed, folder, MORE)
    judge, whole = Judge(arm=arm), CacheConfig(policy="deepcache")
    recipes = {
        "interval 2": replace(whole, interval=2),
        "interval 3": whole,
        "interval 5": replace(whole, interval=5),
        "interval 3, closer together at the clean end": replace(whole, center=1.0),
        "interval 3, closer together at the noisy end": replace(whole, center=0.0),
        "interval 3, order 1": replace(whole, order=1),
        "interval 5, order 1": replace(whole, interval=5, order=1),
    }
    made = {name: arm.made(f"fast-deep-{number}", recipe) for number, (name, recipe) in enumerate(recipes.items())}
    found: Found = {name: judge.beside_fewer_steps(one, scored=name in DEEP) for name, one in made.items()}
    exact = arm.made("fast-deep-exact", replace(whole, interval=1))
    found["interval 1"] = compared(exact).relative_l2
    found["cpu"] = arm.cpu(made["interval 3"]).ratio
    return found


def transformer_caches(seed: int, folder: Path) -> Found:
    """Caches for transformers, of our own and of diffusers, at about a third of the FLOPs."""
    arm = start_of("dit", seed, folder, MORE)
    judge = Judge(arm=arm)
    recipes: Mapping[str, CacheConfig | HookConfig] = {
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
    made = {name: arm.made(f"fast-cache-{number}", recipe) for number, (name, recipe) in enumerate(recipes.items())}
    found: Found = {name: judge.beside_fewer_steps(one) for name, one in made.items()}
    best = min((name for name in made if 1 / found[name]["flops"] >= 3.3), key=lambda name: found[name]["l2"])
    found |= {"best": best, "of the best": judge.beside_fewer_steps(made[best], scored=True)}
    found["cpu"] = arm.cpu(made[best]).ratio
    for interval in (2, 3, 5, 10):
        for bubbling in (0, 3):
            recipe = CacheConfig(policy="adaptive", interval=interval, bubbling=bubbling)
            one = arm.made(f"fast-union-{interval}-{bubbling}", recipe)
            flops = compared(one).flops_after / compared(one).flops_before
            found[f"union {interval} {bubbling}"] = {"l2": compared(one).relative_l2, "flops": flops}
    return found


def routes(seed: int, folder: Path) -> Found:
    """Schedules of each expert's own beside one that suits all, on eight transformers."""
    arm = train("small", seed, folder, MORE)
    found = {}
    for order in (0, 1):
        for is_own in (True, False):
            recipe = CacheConfig(policy="adaptive", interval=4, order=order, bubbling=0, route_aware=is_own, rows=32)
            one = arm.made(f"fast-route-{order}-{is_own}", recipe)
            found[f"order {order}, {'own' if is_own else 'shared'}"] = Judge(arm=arm).of(one)
    return found


STUDENTS: Mapping[str, SiDConfig | ConsistencyConfig | MMDConfig] = {
    "SiD": SiDConfig(training=LEARNING),
    "consistency, from data": ConsistencyConfig(training=EVEN),
    "consistency, from the expert": ConsistencyConfig(training=EVEN, teacher=True),
    "MMD": MMDConfig(training=CHAIN),
}


def students(seed: int, folder: Path) -> Found:
    """Students of one, two and four steps beside as many plain steps, and what they begin or go on with."""
    arm = start_of("small", seed, folder, MORE)
    judge = Judge(arm=arm)
    made = {(name, steps): student(arm, name, steps) for name in STUDENTS for steps in (1, 2, 4)}
    found: Found = {f"{name}, {steps}": judge.varied(one) for (name, steps), one in made.items()}
    found |= {f"plain, {steps}": judge.of(arm.whole, steps) for steps in (1, 2, 4, 8, 16)}
    found["whole"] = judge.varied(arm.whole)
    for steps in (2, 4):
        best = min(STUDENTS, key=lambda name: found[f"{name}, {steps}"]["kid"])
        for extra in (0, 1):
            recipe = BaseFirstConfig(base_steps=1 + extra)
            mixed = arm.made(f"fast-first-{steps}-{extra}", recipe, made[best, steps])
            found[f"base first, {steps} + {extra}"] = judge.varied(mixed) | {"student": best}
    best = min(STUDENTS, key=lambda name: found[f"{name}, 1"]["kid"])
    refined = arm.made("fast-refined", REFINED, made[best, 1])
    found["refined, 1 + 1"] = judge.varied(refined) | {"student": best}
    return found | {"draft of the student": best} | truncated(judge, made[best, 1])


LATER = SiDConfig(steps=1, start=0.8, training=replace(LEARNING, steps=1600))
"""A student that begins with weaker noise, and learns for twice as long."""
LATE = f"SiD from t = {LATER.start}"


def late_students(seed: int, folder: Path) -> Found:
    """A student that begins below t = 1 beside one plain step, and what its expert makes of it."""
    arm = start_of("small", seed, folder, MORE)
    judge, made = Judge(arm=arm), arm.made("fast-late", LATER)
    found: Found = {f"{LATE}, 1": judge.varied(made), "whole": judge.varied(arm.whole)}
    found |= {f"plain, {steps}": judge.of(arm.whole, steps) for steps in (1, 2)}
    refined = arm.made("fast-late-refined", REFINED, made)
    return found | {"refined, 1 + 1": judge.varied(refined) | {"student": LATE}}


def student(arm: Arm, name: str, steps: int) -> Path:
    """A student; one that was trained to be consistent is the same for all steps, and only its course differs."""
    number, recipe = list(STUDENTS).index(name), STUDENTS[name]
    if not isinstance(recipe, ConsistencyConfig):
        return arm.made(f"fast-student-{number}-{steps}", replace(recipe, steps=steps))
    trained = arm.made(f"fast-student-{number}", recipe)
    course = FewStepSchedule.uniform(steps, "renoise", is_distilled=True)
    return going(arm, trained, f"fast-student-{number}-{steps}", "expert_*/expert.json", course)


def going(arm: Arm, pipeline: Path, name: str, files: str, course: FewStepSchedule) -> Path:
    """The same networks on another course."""
    out = arm.extra(name)
    if not out.exists():
        shutil.copytree(pipeline, out)
        for file in out.glob(files):
            write_json(file, read_json(file) | {"few_step": course.described()})
    return out


def truncated(judge: Judge, distilled: Path) -> Found:
    """Two steps from a draft, by where they begin; and from where a search by MMD lets them begin."""
    arm, found = judge.arm, {}
    for name in ("anchors", "autoregressive", "expert", "student"):
        recipe = TruncateConfig(draft=name)
        searched = arm.made(f"fast-draft-{name}", recipe, distilled if name == "student" else arm.whole)
        found[f"draft {name}"] = judge.of(searched)
        for t in STARTS:
            course = FewStepSchedule.uniform(recipe.steps, "euler", start=t)
            one = going(arm, searched, f"fast-draft-{name}-{t}", "expert_*/refiner/expert.json", course)
            found[f"draft {name} at {t}"] = judge.of(one)
    return found


def everything(seed: int, folder: Path) -> Found:
    """Eight transformers: distilled, pruned, in eight bits; all students begin with one that has learned from all."""
    arm = train("small", seed, folder, MORE)
    judge, found = Judge(arm=arm), Found()
    found["whole"] = judge.of(arm.whole)
    found |= {f"plain, {steps}": judge.of(arm.whole, steps) for steps in (2, 4, 8, 16)}
    distilling = SiDConfig(steps=1, training=replace(LEARNING, steps=120), shared_warmup_steps=200)
    pruning = LaptopConfig(ratio=0.1, finetune=TrainingConfig(steps=200, batch_size=32, lr=2e-4, warmup_steps=20))
    student = arm.made("fast-all-1", distilling)
    refined = arm.made("fast-all-1-refined", REFINED, student)
    pruned = arm.made("fast-all-1-pruned", pruning, refined)
    name = "distilled in 1, refined in 1"
    made = {
        name: refined,
        f"{name}, pruned": pruned,
        f"{name}, pruned, 8 bits": arm.made("fast-all-1-pruned-8", DynamicInt8Config(), pruned),
        f"{name}, pruned, weights in 8 bits": arm.made("fast-all-1-pruned-w8", WeightOnlyConfig(), pruned),
    }
    found |= {title: judged(judge, one) for title, one in made.items()}
    cached = arm.made("fast-all-cached", CacheConfig(interval=4, order=1))
    found["cached"] = judged(judge, cached)
    found["cached, 8 bits"] = judged(judge, arm.made("fast-all-cached-8", DynamicInt8Config(), cached))
    return found


def judged(judge: Judge, pipeline: Path) -> Found:
    """With bytes and processor time over the ensemble's, of a whole batch, which eight experts share."""
    sizes, batch = compared(pipeline), judge.arm.config.ensemble.batch_size
    return judge.of(pipeline) | {
        "bytes": sizes.bytes_after / sizes.bytes_before,
        "cpu": judge.arm.cpu(pipeline, images=batch).ratio,
    }


PARTS: Parts = {
    "unet_caches": unet_caches,
    "transformer_caches": transformer_caches,
    "routes": routes,
    "students": students,
    "late_students": late_students,
    "everything": everything,
}
