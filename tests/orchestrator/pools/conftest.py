"""Fixtures: fake `kubectl` and `sky` in a folder on the PATH."""

from dataclasses import dataclass
from pathlib import Path

import pytest

KUBECTL = """#!/bin/sh
echo "kubectl $*" >> "$FAKE/calls"
case "$*" in
  *api-resources*) cat "$FAKE/kinds" 2>/dev/null ;;
  *explain*) test -e "$FAKE/tls" || { echo 'field "tlsOptions" does not exist' >&2; exit 1; } ;;
  *can-i*) test -e "$FAKE/allowed" && echo yes || { echo no; exit 1; } ;;
  *apply*ray_cluster.yaml) test -e "$FAKE/full" && { echo "quota" >&2; exit 1; }; touch "$FAKE/cluster" ;;
  *delete*ray_cluster.yaml*) test -e "$FAKE/stuck" || rm -f "$FAKE/cluster" ;;
  *get*rayclusters*) test -e "$FAKE/cluster" && echo raycluster.ray.io/ddm-kuberay ;;
  *get*pods*) test -e "$FAKE/cluster" && echo pod/ddm-kuberay-head ;;
esac
exit 0
"""
SKY = """#!/bin/sh
echo "sky $*" >> "$FAKE/calls"
case "$1" in
  check) test -e "$FAKE/cloud" && echo '{"default": {"AWS": ["compute"]}}' || echo '{"default": {}}' ;;
  launch) echo "$5" >> "$FAKE/launched" ;;
  status) printf '\\033[2mStarting a local server.\\n'
    names=$(sed 's/.*/{"name": "&"}/' "$FAKE/launched" 2>/dev/null | paste -sd,); printf '[\\n%s\\n]\\n' "$names" ;;
  down) test -e "$FAKE/stuck" || rm -f "$FAKE/launched" ;;
esac
exit 0
"""


@dataclass(frozen=True)
class Tools:
    """Folder of the fake tools: a file in it changes their behavior, and `calls` lists their calls."""

    folder: Path

    def set(self, name: str, text: str = "") -> None:
        (self.folder / name).write_text(text)

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Tools:
    """Put `kubectl` and `sky` on the PATH as small programs that record their calls in files."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name, text in {"kubectl": KUBECTL, "sky": SKY}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE", str(folder))
    return Tools(folder)
