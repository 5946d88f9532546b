"""The templates of the page: its own and the report's sections; every value but the charts is escaped."""

import re
import time

from jinja2 import Environment
from markupsafe import Markup, escape

from orchestrator.controller import project_version
from orchestrator.reporting.charts import COLORS, MUTED
from orchestrator.reporting.page import create_templates as create_report_templates
from orchestrator.reporting.summary import format_duration

COMMAND = re.compile("`([^`]+)`")


def create_templates() -> Environment:
    """Return the templates with their filters."""
    templates = create_report_templates(("orchestrator.ui", "templates"))
    templates.filters |= {"ago": format_ago, "commands": mark_commands, "cluster_color": cluster_color}
    templates.globals |= {"version": project_version(), "overview": None, "view": "runs"}
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
