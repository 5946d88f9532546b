"""Test data: every pool in `cluster_configs/pool`, and generated pools."""

from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from orchestrator.pools.config import PoolConfig
from orchestrator.pools.load_config import load_pool, parse_pool
from orchestrator.pools.render import render

FOLDER = Path(__file__).parents[3] / "cluster_configs" / "pool"
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_shipped(name: str, *overrides: str) -> PoolConfig:
    return load_pool(FOLDER, name, overrides)


def render_document(config: PoolConfig, file: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(render(config)[file])
    return loaded


NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,9}", fullmatch=True)
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\x00", exclude_categories=["Cs", "Cc"]), max_size=20)


@st.composite
def nodes(draw: st.DrawFn) -> dict[str, Any]:
    """Generate one type of nodes, without a fallback."""
    gpus = draw(st.integers(0, 8))
    min_nodes = draw(st.integers(0, 3))
    return {
        "machine": draw(st.sampled_from(["g6.xlarge", "p5.48xlarge"])),
        "gpu": draw(st.sampled_from(["L4", "A100-80GB"])) if gpus else "",
        "gpus": gpus,
        "cpus": draw(st.integers(1, 96)),
        "memory_gb": draw(st.floats(0.5, 2000)),
        "disk_gb": draw(st.integers(10, 1000)),
        "spot": draw(st.booleans()),
        "min_nodes": min_nodes,
        "max_nodes": draw(st.integers(min_nodes, 20)),
        "price_per_hour": draw(st.floats(0, 100)),
    }


@st.composite
def pools(draw: st.DrawFn, provider: str) -> PoolConfig:
    """Generate a pool with any nodes, fallbacks, tags and limits, based on the provider's shipped one."""
    base = yaml.safe_load((FOLDER / f"{provider}.yaml").read_text())
    types = draw(st.dictionaries(NAMES.filter(lambda name: name != "head"), nodes(), min_size=1, max_size=4))
    for name, node in list(types.items()):
        if node["spot"] and draw(st.booleans()) and f"{name}_on_demand" not in types:
            types[f"{name}_on_demand"] = {**node, "spot": False}
            node["fallback"] = f"{name}_on_demand"
    changes = {
        "name": draw(NAMES),
        "nodes": types,
        "idle_minutes": draw(st.floats(0.05, 600)),
        "tags": draw(st.dictionaries(NAMES, WORDS, max_size=3)),
        "max_price_per_hour": None,
    }
    return parse_pool({**base, **changes})
