"""A stage is data: what to run, on which inputs, with which resources. The backend decides how it runs.

Two stages with the same name, configuration and inputs have the same fingerprint and share a folder. The second one
therefore finds its artifact finished and does nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ddm_core.artifacts import fingerprint
from orchestrator.config.compute import ResourcesConfig

FIRST_SAMPLES = "samples.png"
"""Picture in the folder of an attempt at an expert, drawn at its first checkpoint."""

STEP_SAMPLES = "samples-{:08d}.png"
"""The same at a step: that one, and some later ones."""

VALIDATION = "validation.jsonl"
"""Rows in the same folder with the step and the distance of the expert's samples from held-out images."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """An artifact that a stage reads, or a part of it; the stage receives this folder and no other."""

    stage: "Stage"
    part: str = ""
    """Path inside the artifact, such as `latents/3`; empty is the complete artifact."""
    is_hashed: bool = True
    """Whether it is part of the stage's fingerprint; an input that follows from the others need not be."""

    @property
    def fingerprint(self) -> str:
        """Return the artifact's fingerprint, with the part after a slash."""
        return f"{self.stage.fingerprint}/{self.part}" if self.part else self.stage.fingerprint


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the pipeline."""

    name: str
    """Unique in its graph, such as `expert_3`."""
    kind: str
    """A key of `config.stage_kinds.STAGE_KINDS`, such as `expert`."""
    config: Any
    """The kind's configuration dataclass."""
    inputs: Mapping[str, Input] = field(default_factory=dict)
    """Artifacts by role."""
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Resources of one attempt."""
    engine: str = "local"
    """`data.engine`, for kinds that have one."""
    optional: bool = False
    """Whether the run continues without it after it has failed for good."""
    identity: str = ""
    """The name in its fingerprint and of its folder, if it is another: one that the stage had before it was followed
    by a later one of its name (`ddm extend`)."""
    rank: int = 0
    """Of the stages that can start, those of the lowest rank start first."""

    @cached_property
    def fingerprint(self) -> str:
        """Return the hash of name, configuration and the inputs' fingerprints."""
        return fingerprint(self.identity or self.name, self.config, self.input_fingerprints)

    @property
    def input_fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of every input that has one, by role."""
        return {role: artifact.fingerprint for role, artifact in self.inputs.items() if artifact.is_hashed}

    @property
    def folder_name(self) -> str:
        """Return the name that its artifact and its scratch folder share."""
        return f"{self.identity or self.name}-{self.fingerprint[:12]}"


def expert_id(name: str) -> int | None:
    """Return k of `expert_<k>`, the name of an expert's stage and role; None for any other name."""
    number = name.removeprefix("expert_")
    return int(number) if number != name and number.isdecimal() else None


def remove_stage(graph: Sequence[Stage], name: str) -> list[Stage]:
    """Return the graph without one stage; every stage that read it is rebuilt and has another fingerprint."""
    rebuilt: dict[str, Stage] = {}
    for stage in graph:
        if stage.name == name:
            continue
        inputs = {
            role: replace(artifact, stage=rebuilt[artifact.stage.name])
            for role, artifact in stage.inputs.items()
            if artifact.stage.name != name
        }
        rebuilt[stage.name] = replace(stage, inputs=inputs)
    return list(rebuilt.values())
