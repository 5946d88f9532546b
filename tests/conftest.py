"""Import heavy libraries before jaxtyping's import hook, and order the tests."""

import gc
import os
import tempfile
from importlib import import_module

import pytest
from hypothesis import settings

from tests.type_checks import calls, check_first_calls

settings.register_profile("untimed", deadline=None)  # no test depends on the speed of the machine
settings.load_profile("untimed")
os.environ["DDM_HOME"] = tempfile.mkdtemp(prefix="ddm-tests-")  # the key that signs run folders

HEAVY = (
    "beartype.door",
    "diffusers.hooks",
    "diffusers.models.transformers.dit_transformer_2d",
    "diffusers.models.unets.unet_2d",
    "faiss",
    "scipy.stats",
    "sklearn.linear_model",
    "torch._dynamo",
)
"""Libraries that no module of ours may import first: under jaxtyping's hook they would all be compiled again."""
for library in HEAVY:
    import_module(library)

check_first_calls()
# Ray reads its switches when it is imported, which happens while tests are collected.
import_module("orchestrator.controller").configure_ray_security(None)


@pytest.fixture(autouse=True)
def _check_first_calls_again() -> None:
    calls.clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take long, so that all workers end together."""
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)


def pytest_collection_finish() -> None:
    """Leave modules and tests out of later garbage collections."""
    gc.collect()
    gc.freeze()
