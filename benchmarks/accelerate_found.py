"""What `benchmarks.accelerate` measures: caches, students, drafts and all of them together, each beside plain steps.

Each part keeps what it has made and measured in its run folder, so that a stopped benchmark goes on where it was.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from artifacts import read_json, write_json
from benchmarks.compress_arms import SPACES, Arm, start_of, train
from benchmarks.compress_found import Found, Parts, compared
from ensemble.metrics import vendi_score
from ensemble.scoring import Reference
from ensemble.stages.cache_config import CacheConfig, HookConfig
from ensemble.stages.config import ComputeConfig
from ensemble.stages.consistency_config import ConsistencyConfig
from ensemble.stages.laptop_config import LaptopConfig
from ensemble.stages.mmd_config import MMDConfig
from ensemble.stages.sid_config import SiDConfig
from ensemble.stages.truncate_config import BaseFirstConfig, TruncateConfig
from experts.config import TrainingConfig
from orchestrator.graph import plain_evaluation

STEPS = 50
"""Of the samples that everything is compared with."""
MORE = (f"ensemble.steps={STEPS}",)

LEARNING = TrainingConfig(steps=1500, batch_size=64, lr=2e-4, warmup_steps=50, t_mean=0.7, t_std=1.6)
"""How students learn by score identity distillation."""
EVEN = replace(LEARNING, t_mean=0.0, t_std=1.0, steps=2500, lr=5e-4)
"""How they learn to be consistent."""
CHAIN = TrainingConfig(steps=300, batch_size=128, lr=2e-4, warmup_steps=20, clip_norm=0.5)
"""How a short chain learns by its MMD."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Scores of whatever is drawn, against the ensemble in all its steps."""

    arm: Arm

    def of(self, pipeline: Path, steps: int | None = None) -> Found:
        """KID over the whole ensemble's, FLOPs of an image over its, and relative L2 distance of the images to its."""
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
            "vendi": self._vendi(out),
        }

    def beside_fewer_steps(self, pipeline: Path) -> Found:
        """The same, and that of as many plain steps as cost what it costs."""
        found = self.of(pipeline)
        steps = max(1, round(STEPS * found["flops"]))
        return found | {"steps": steps, "fewer": self.of(self.arm.whole, steps)}

    def _vendi(self, scored: Path) -> float:
        file = scored / "vendi.json"
        if not file.exists():
            real = Reference.load(self.arm.folder("reference"), plain_evaluation(self.arm.config))
            features = real.extract(np.load(scored / "images.npy")).spaces[SPACES[1]]
            write_json(file, vendi_score(features))
        return float(read_json(file))


def unet_caches(seed: int, folder: Path) -> Found:
    """DeepCache on eight U-Nets, each sample with the cache of its expert."""
    arm = train("unet", seed, folder, MORE)
    judge, whole = Judge(arm=arm), CacheConfig(policy="deepcache")
    recipes = {
        "interval 2": replace(whole, interval=2),
        "interval 3": whole,
        "interval 5": replace(whole, interval=5),
        "interval 3, closer together at the clean end": replace(whole, centre=1.0),
    }
    made = {name: arm.made(f"fast-deep-{number}", recipe) for number, (name, recipe) in enumerate(recipes.items())}
    found: Found = {name: judge.beside_fewer_steps(one) for name, one in made.items()}
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
        "adaptive, with union": CacheConfig(policy="adaptive", interval=5, bubbling=3),
        "adaptive, without union": CacheConfig(policy="adaptive", interval=4, bubbling=0),
        "adaptive, without union, order 1": CacheConfig(policy="adaptive", interval=4, bubbling=0, order=1),
        "one schedule for all": CacheConfig(policy="unified", interval=4),
        "TaylorSeer (diffusers), order 1, interval 4": HookConfig(interval=4, order=1),
        "TaylorSeer (diffusers), order 2, interval 4": HookConfig(interval=4, order=2),
        "first block (diffusers)": HookConfig(hook="first_block", threshold=0.25),
        "MagCache (diffusers)": HookConfig(hook="mag", interval=5, threshold=0.5),
        "pyramid attention (diffusers)": HookConfig(hook="pyramid", interval=4),
    }
    made = {name: arm.made(f"fast-cache-{number}", recipe) for number, (name, recipe) in enumerate(recipes.items())}
    found: Found = {name: judge.beside_fewer_steps(one) for name, one in made.items()}
    best = min((name for name in found if 1 / found[name]["flops"] >= 3.3), key=lambda name: found[name]["l2"])
    found["best"], found["cpu"] = best, arm.cpu(made[best]).ratio
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
    judge, made = Judge(arm=arm), {}
    for number, (name, recipe) in enumerate(STUDENTS.items()):
        for steps in (1, 2, 4):
            made[name, steps] = arm.made(f"fast-student-{number}-{steps}", replace(recipe, steps=steps))
    found: Found = {f"{name}, {steps}": judge.of(one) for (name, steps), one in made.items()}
    found |= {f"plain, {steps}": judge.of(arm.whole, steps) for steps in (1, 2, 4, 8, 16)}
    found["whole"] = judge.of(arm.whole)
    for steps in (2, 4):
        best = min(STUDENTS, key=lambda name: found[f"{name}, {steps}"]["kid"])
        for extra in (1, 2):
            mixed = arm.made(f"fast-first-{steps}-{extra}", BaseFirstConfig(base_steps=extra), made[best, steps])
            found[f"base first, {steps} + {extra - 1}"] = judge.of(mixed) | {"student": best}
    return found | truncated(arm, judge, made)


def truncated(arm: Arm, judge: Judge, made: Mapping[tuple[str, int], Path]) -> Found:
    """Two steps from a draft, by where they begin."""
    found: Found = {}
    best = min(STUDENTS, key=lambda name: judge.of(made[name, 1])["kid"])
    drafts: dict[str, tuple[TruncateConfig, Path]] = {
        "anchors": (TruncateConfig(draft="anchors"), arm.whole),
        "autoregressive": (TruncateConfig(draft="autoregressive"), arm.whole),
        "expert": (TruncateConfig(draft="expert"), arm.whole),
        "student": (TruncateConfig(draft="student"), made[best, 1]),
    }
    for name, (recipe, given) in drafts.items():
        for t in (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
            one = arm.made(f"fast-draft-{name}-{t}", replace(recipe, t_start=t), given)
            found[f"draft {name} at {t}"] = judge.of(one)
        searched = arm.made(f"fast-draft-{name}", recipe, given)
        found[f"draft {name}"] = judge.of(searched)
    return found


def everything(seed: int, folder: Path) -> Found:
    """Eight transformers: distilled, pruned, in eight bits."""
    arm = train("small", seed, folder, MORE)
    judge = Judge(arm=arm)
    learning = replace(LEARNING, steps=500)
    found: Found = {"whole": judge.of(arm.whole)}
    found |= {f"plain, {steps}": judge.of(arm.whole, steps) for steps in (2, 4, 8, 16)}
    for steps in (2, 4):
        student = arm.made(f"fast-all-{steps}", SiDConfig(steps=steps, training=learning))
        again = TrainingConfig(steps=300, batch_size=32, lr=2e-4, warmup_steps=20)
        pruned = arm.made(f"fast-all-{steps}-pruned", LaptopConfig(share=0.1, retraining=again), student)
        small = arm.made(f"fast-all-{steps}-small", ComputeConfig(), pruned)
        whole = arm.made(f"fast-all-{steps}-bits", ComputeConfig(), student)
        for name, one in (("distilled", student), ("pruned", pruned), ("pruned, 8 bits", small), ("8 bits", whole)):
            sizes = {"bytes": compared(one).bytes_after / compared(one).bytes_before, "cpu": arm.cpu(one).ratio}
            found[f"{name}, {steps}"] = judge.of(one) | sizes
    cached = arm.made("fast-all-cached", CacheConfig(interval=4, order=1))
    small = arm.made("fast-all-cached-small", ComputeConfig(), cached)
    for name, one in (("cached", cached), ("cached, 8 bits", small)):
        sizes = {"bytes": compared(one).bytes_after / compared(one).bytes_before, "cpu": arm.cpu(one).ratio}
        found[name] = judge.of(one) | sizes
    return found


PARTS: Parts = {
    "unet_caches": unet_caches,
    "transformer_caches": transformer_caches,
    "routes": routes,
    "students": students,
    "everything": everything,
}
