"""Do the scores get worse when real images do? (`make bench-score-laws`) The law behind every ranking.

Each ladder of damage starts at other real images, so a score passes it if it is worse at every step than before.
Scores that fail a ladder are not ranked by any table.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.arms.damage import Images, RealSet, damage_ladders, load_emoji, load_garments, load_photo_patches
from benchmarks.record import Claim, Listing, write_result
from data_partition.features.efficientnet import EfficientNetFeatures, load_feature_network
from data_partition.features.pixels import flatten_pixels
from data_partition.features.random_conv import RandomConvFeatures, compute_responses, make_random_filters
from ddm_core.artifacts import to_jsonable
from ensemble.evaluation.feature_space import principal_axes, scale_features
from ensemble.evaluation.metrics import frechet_distance, kernel_distance, neighbor_radii, share_covered
from ensemble.evaluation.nearest_neighbors import Space, extract_features
from ensemble.evaluation.spaces import PIXELS

COMPONENTS, NEIGHBOURS = 64, 3
RANKED = ("efficientnet_lite0 FD", "efficientnet_lite0 KID")
"""What tables rank by."""
REAL = "real images"

Values = Mapping[str, float]
"""Scores of one set of images by name, all such that more is worse."""
Ladder = Sequence[Values]


def main() -> None:
    """Measure all data sets, write docs/benchmarks/score_laws.json and print its claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="images of each set")
    parser.add_argument("--emoji", type=Path, nargs="*", default=[], help="archives with `image` and `category`")
    options = parser.parse_args()
    started = time.monotonic()
    sets = {"garments": load_garments(), "photo patches": load_photo_patches()}
    if options.emoji:
        sets["emoji"] = load_emoji(options.emoji)
    ladders = {
        f"{name}: {kind}": steps
        for name, real in sets.items()
        for kind, steps in measure_ladders(real, options.count).items()
    }
    claims, listings = list(order_claims(ladders)), list(value_listings(ladders))
    note = (
        f"{options.count} images of each set, compared with as many others. KID is in thousandths. Each ladder starts "
        "at real images; its steps are named in `benchmarks/arms/damage.py`. A score whose row is not complete is "
        "shown by no table as a ranking."
    )
    result = write_result("score_laws", time.monotonic() - started, claims, listings, [note])
    print(json.dumps(to_jsonable(result["claims"]), indent=1))


def measure_ladders(real: RealSet, count: int) -> Mapping[str, Ladder]:
    """Score real images and each step of damage against `count` others."""
    held_out = real.images[:count]
    others = RealSet(images=real.images[count:], labels=real.labels[count:])
    scorers = [*make_scorers(held_out, others.images)]

    def score(images: Images) -> Values:
        print(".", end="", flush=True)
        return {name: value for scorer in scorers for name, value in scorer(images).items()}

    start = score(others.images[:count])
    return {kind: [start, *map(score, steps)] for kind, steps in damage_ladders(others, count).items()}


def make_scorers(held_out: Images, training: Images) -> Iterator["Scorer"]:
    """Yield a scorer of each feature space."""
    filters = make_random_filters(0)
    random_conv = RandomConvFeatures(
        filters, extract_features(lambda x: compute_responses(filters, x), training).mean(0)
    )
    efficientnet = EfficientNetFeatures(load_feature_network())
    yield Scorer("efficientnet_lite0", lambda images: scale_features(efficientnet(images)), held_out)
    yield Scorer("random_conv", lambda images: scale_features(random_conv(images)), held_out)
    yield Scorer(PIXELS, lambda images: 2 * flatten_pixels(images) - 1, held_out)


class Scorer:
    """All scores in one feature space, also those that no table shows."""

    def __init__(self, name: str, space: Space, held_out: Images) -> None:
        self.name, self.space, self.real = name, space, extract_features(space, held_out)
        self.radii = neighbor_radii(self.real, NEIGHBOURS)
        self.axes = None if name == PIXELS else principal_axes(self.real, COMPONENTS)

    def __call__(self, images: Images) -> Values:
        """Return the scores of images; precision and recall are negated, because more is better."""
        features = extract_features(self.space, images)
        sides = [features if self.axes is None else features @ self.axes.T for features in (features, self.real)]
        scores = {
            "FD": frechet_distance(*sides),
            "KID": 1000 * kernel_distance(features, self.real)[0],
            "precision": -share_covered(features, self.real, self.radii),
            "recall": -share_covered(self.real, features, neighbor_radii(features, NEIGHBOURS)),
        }
        return {f"{self.name} {name}": value for name, value in scores.items()}


def is_in_order(ladder: Ladder, score: str) -> bool:
    """Return whether a score is worse at every step than before."""
    return all(before[score] < after[score] for before, after in itertools.pairwise(ladder))


def order_claims(ladders: Mapping[str, Ladder]) -> Iterator[Claim]:
    """Yield a claim for each score that a table ranks by."""
    for score in RANKED:
        failed = [name for name, ladder in ladders.items() if not is_in_order(ladder, score)]
        yield Claim(
            name=f"{score} is worse at every step of damage",
            bar=f"{len(ladders)} of {len(ladders)} ladders",
            value=f"{len(ladders) - len(failed)} of {len(ladders)}" + (f"; not {', '.join(failed)}" if failed else ""),
            spread="",
            holds=not failed,
        )


def value_listings(ladders: Mapping[str, Ladder]) -> Iterator[Listing]:
    """Yield which scores pass which ladders, and the values of those that rank."""
    scores = list(next(iter(ladders.values()))[0])
    yield Listing(
        title="Ladders that each score passes",
        columns=("score", "passed", "failed"),
        rows=[
            (
                f"**{score}**" if score in RANKED else score,
                f"{sum(is_in_order(ladder, score) for ladder in ladders.values())} of {len(ladders)}",
                ", ".join(name for name, ladder in ladders.items() if not is_in_order(ladder, score)) or "–",
            )
            for score in scores
        ],
    )
    for score in (*RANKED, "pixels FD", "random_conv precision", "random_conv recall"):
        sign = -1 if score.endswith(("precision", "recall")) else 1
        rows = [
            (name, *(f"{sign * step[score]:.4g}" for step in ladder), *[""] * (4 - len(ladder)))
            for name, ladder in ladders.items()
        ]
        yield Listing(title=score, columns=("ladder", REAL, "step 1", "step 2", "step 3"), rows=rows)


if __name__ == "__main__":
    main()
