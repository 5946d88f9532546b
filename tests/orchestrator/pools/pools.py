"""What to test with: every pool that ships, and any pool that could be written."""

from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from orchestrator.pools.config import PoolConfig
from orchestrator.pools.load_config import parse_pool, pool_config
from orchestrator.pools.render import render

FOLDER = Path(__file__).parents[3] / "cluster_configs" / "pool"
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def shipped(name: str, *overrides: str) -> PoolConfig:
    return pool_config(FOLDER, name, overrides)


def document(config: PoolConfig, file: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(render(config)[file])
    return loaded


NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,9}", fullmatch=True)
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\x00", exclude_categories=["Cs", "Cc"]), max_size=20)


@st.composite
def nodes(draw: st.DrawFn) -> dict[str, Any]:
    """One type of nodes, without a fallback."""
    gpus = draw(st.integers(0, 8))
    fewest = draw(st.integers(0, 3))
    return {
        "machine": draw(st.sampled_from(["g6.xlarge", "p5.48xlarge"])),
        "gpu": draw(st.sampled_from(["L4", "A100-80GB"])) if gpus else "",
        "gpus": gpus,
        "cpus": draw(st.integers(1, 96)),
        "memory_gb": draw(st.floats(0.5, 2000)),
        "disk_gb": draw(st.integers(10, 1000)),
        "spot": draw(st.booleans()),
        "min_nodes": fewest,
        "max_nodes": draw(st.integers(fewest, 20)),
        "price_per_hour": draw(st.floats(0, 100)),
    }


@st.composite
def pools(draw: st.DrawFn, provider: str) -> PoolConfig:
    """A pool of any nodes, fallbacks, tags and limits on top of the one that ships for the provider."""
    ordinary = yaml.safe_load((FOLDER / f"{provider}.yaml").read_text())
    types = draw(st.dictionaries(NAMES.filter(lambda name: name != "head"), nodes(), min_size=1, max_size=4))
    for name, node in list(types.items()):
        if node["spot"] and draw(st.booleans()) and f"{name}_firm" not in types:
            types[f"{name}_firm"] = {**node, "spot": False}
            node["fallback"] = f"{name}_firm"
    drawn = {
        "name": draw(NAMES),
        "nodes": types,
        "idle_minutes": draw(st.floats(0.05, 600)),
        "tags": draw(st.dictionaries(NAMES, WORDS, max_size=3)),
        "max_price_per_hour": None,
    }
    return parse_pool({**ordinary, **drawn})
