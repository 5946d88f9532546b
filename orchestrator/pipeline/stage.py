"""A stage is data: what to run, on what, with which resources. How it runs is the backend's business.

Two stages with the same name, configuration and inputs are the same stage: they share a fingerprint, hence a
folder, hence the second does nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ddm_core.artifacts import fingerprint
from orchestrator.config.compute import ResourcesConfig


@dataclass(frozen=True, kw_only=True)
class Input:
    """An artifact that a stage reads, or a part of it: whoever runs the stage is given that folder and no other."""

    stage: "Stage"
    part: str = ""
    """Path inside the artifact, such as `clusters/3`; empty is the whole."""

    @property
    def fingerprint(self) -> str:
        """The artifact's fingerprint, with the part behind a slash."""
        return f"{self.stage.fingerprint}/{self.part}" if self.part else self.stage.fingerprint


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the pipeline."""

    name: str
    """Unique in its graph, such as `expert_3`."""
    kind: str
    """Which function runs it: a key of `stage_functions.KINDS`, such as `expert`."""
    config: Any
    """The kind's configuration dataclass."""
    inputs: Mapping[str, Input] = field(default_factory=dict)
    """Artifacts by role."""
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    """What one attempt asks of a worker."""
    optional: bool = False
    """Whether the run goes on without it once it has failed for good."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of name, configuration and the inputs' fingerprints."""
        return fingerprint(self.name, self.config, self.input_fingerprints)

    @property
    def input_fingerprints(self) -> dict[str, str]:
        """Fingerprint of every input, by role."""
        return {role: given.fingerprint for role, given in self.inputs.items()}

    @property
    def folder_name(self) -> str:
        """The name that its artifact and its scratch folder share."""
        return f"{self.name}-{self.fingerprint[:12]}"


def without(graph: Sequence[Stage], lost: str) -> list[Stage]:
    """The graph with stage `lost` taken out; what read it is rebuilt, and so has another fingerprint."""
    rebuilt: dict[str, Stage] = {}
    for stage in graph:
        if stage.name == lost:
            continue
        inputs = {
            role: replace(given, stage=rebuilt[given.stage.name])
            for role, given in stage.inputs.items()
            if given.stage.name != lost
        }
        rebuilt[stage.name] = replace(stage, inputs=inputs)
    return list(rebuilt.values())
