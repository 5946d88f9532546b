"""Real garments that are damaged more score worse, in every score that a table ranks by.

`benchmarks/score_laws.py` tests the same on three data sets, with more images and steps.
"""

import numpy as np
import pytest

from benchmarks.arms.damage import RealSet, damage_ladders, load_garments
from data_partition.features.efficientnet import EfficientNetFeatures, load_feature_network
from ensemble.evaluation.feature_space import HeldOutSpace, scale_features
from ensemble.evaluation.nearest_neighbors import extract_features
from ensemble.evaluation.scores import Distances
from ensemble.evaluation.spaces import RANKED_SPACE, is_clear

COUNT, COMPONENTS, NEIGHBOURS = 128, 16, 3


@pytest.fixture(scope="module")
def ladders() -> dict[str, list[Distances]]:
    """Return the distances of real images, and of two steps of each kind of damage."""
    real, network = load_garments(limit=2000), EfficientNetFeatures(load_feature_network())
    others = RealSet(images=real.images[COUNT:], labels=real.labels[COUNT:])

    def extract(images):
        return extract_features(lambda batch: scale_features(network(batch)), images)

    held_out = HeldOutSpace.fit(RANKED_SPACE, extract(real.images[:COUNT]), COMPONENTS, NEIGHBOURS)
    start = held_out.compare(extract(others.images[:COUNT]), NEIGHBOURS)
    damaged = damage_ladders(others, COUNT)
    return {
        kind: [start, *(held_out.compare(extract(images), NEIGHBOURS) for images in steps[-2:])]
        for kind, steps in damaged.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["speckle", "blur", "posterization", "codec", "classes dropped"])
def test_more_damage_is_worse_in_every_score_that_ranks(ladders, kind):
    for score in ("fd", "kid"):
        values = [getattr(step, score) for step in ladders[kind]]
        errors = [getattr(step, f"{score}_std") for step in ladders[kind]]
        assert np.all(np.diff(values) > 0), score
        assert is_clear(values[-1] - values[0], errors[-1], errors[0]), score
