"""Render a document as YAML."""

from collections.abc import Mapping
from typing import Any

import yaml


def to_yaml(document: Mapping[str, Any], *, comment: str) -> str:
    """Render a document as YAML below a comment line; keys keep their order."""
    text = yaml.dump(dict(document), Dumper=_PlainDumper, sort_keys=False, width=1000, default_flow_style=False)
    return f"# {comment}\n{text}"


class _PlainDumper(yaml.SafeDumper):
    """YAML dumper without anchors, with multi-line text as blocks."""

    def ignore_aliases(self, data: object) -> bool:
        """Write repeated objects in full."""
        return True


def _represent_text(dumper: _PlainDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_PlainDumper.add_representer(str, _represent_text)
