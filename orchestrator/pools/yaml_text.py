"""How a document becomes text."""

from collections.abc import Mapping
from typing import Any

import yaml


def as_yaml(document: Mapping[str, Any], *, about: str) -> str:
    """A document as YAML, with a first line that says what it is; keys keep their order."""
    text = yaml.dump(dict(document), Dumper=_Plain, sort_keys=False, width=1000, default_flow_style=False)
    return f"# {about}\n{text}"


class _Plain(yaml.SafeDumper):
    """No anchors, and text of several lines as such."""

    def ignore_aliases(self, data: object) -> bool:
        """Write what is the same twice out twice."""
        return True


def _block(dumper: _Plain, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Plain.add_representer(str, _block)
