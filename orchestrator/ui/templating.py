"""The templates of the live views and of the report; every value but the charts is escaped."""

import base64
import re
import time
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from orchestrator.controller import project_version
from orchestrator.reporting.charts import COLORS, MUTED
from orchestrator.reporting.costs import format_bytes
from orchestrator.reporting.pareto import MAX_KID_RATIO
from orchestrator.reporting.summary import format_duration
from orchestrator.reporting.tables.analysis_tables import SURPRISING
from orchestrator.reporting.tables.ranking import is_blurred
from orchestrator.ui.facts.sections import audit_rows

COMMAND = re.compile("`([^`]+)`")


STYLE = Path(__file__).parent / "static" / "ui.css"


def create_templates() -> Environment:
    """Return the templates with their filters."""
    templates = Environment(
        loader=PackageLoader("orchestrator.ui", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "ago": format_ago,
        "audit_rows": audit_rows,
        "bytes": format_bytes,
        "cluster_color": cluster_color,
        "commands": mark_commands,
        "data_url": data_url,
        "duration": format_duration,
        "si": format_si,
    }
    templates.globals |= {
        "has_playground": False,
        "is_blurred": is_blurred,
        "is_static": False,
        "max_kid": MAX_KID_RATIO,
        "overview": None,
        "surprising": SURPRISING,
        "version": project_version(),
        "view": "runs",
    }
    return templates


def cluster_color(k: int | None) -> str:
    """Return the color of a cluster and its expert on the page; gray for None, several of them."""
    if k is None:
        return MUTED
    return COLORS[k] if k < len(COLORS) else f"hsl({k * 137.5 % 360:.0f} 45% 55%)"


def format_ago(moment: float, now: float | None = None) -> str:
    """Return how long ago a time (seconds since the epoch) was."""
    if not moment:
        return "never"
    seconds = max(0.0, (time.time() if now is None else now) - moment)
    if seconds < 60:
        return f"{seconds:.0f} s ago"
    return f"{format_duration(round(seconds))} ago"


def mark_commands(text: str) -> Markup:
    """Return an escaped sentence in which what stands between backticks is code."""
    return Markup(COMMAND.sub(r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped before


def data_url(png: bytes) -> str:
    """Return a picture as an address that needs no other file."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def format_si(value: float) -> str:
    """Return a number with a metric prefix: 1.23 T."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.2f} {prefix}"
    return f"{value:.0f}"
