"""Fill in the templates of the page; every value is escaped."""

import time

from jinja2 import Environment, PackageLoader, StrictUndefined

from orchestrator.controller import project_version
from orchestrator.reporting.costs import format_bytes
from orchestrator.reporting.summary import format_duration


def create_templates() -> Environment:
    """Return the templates with their filters."""
    templates = Environment(
        loader=PackageLoader("orchestrator.ui", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"duration": format_duration, "bytes": format_bytes, "ago": format_ago}
    templates.globals |= {"version": project_version(), "overview": None, "view": "runs"}
    return templates


def format_ago(moment: float, now: float | None = None) -> str:
    """Return how long ago a time (seconds since the epoch) was."""
    if not moment:
        return "never"
    seconds = max(0.0, (time.time() if now is None else now) - moment)
    return "just now" if seconds < 10 else f"{format_duration(round(seconds))} ago"
