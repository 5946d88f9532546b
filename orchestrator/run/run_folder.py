"""The run folder: the only place where a run's state is kept, and the only file that knows its names.

config.yaml                       the composed configuration of the latest `ddm run`
journal.jsonl                     what happened, append-only
controller.json                   which controller walks the run, with a heartbeat
run_id                            eight hex digits that name this run on islands
islands.json                      which islands do not answer, while that is so
submission.json                   the latest `ddm submit`, and that its job has found this folder
wheels/                           the code as it was sent to islands
stop                              a request to stop; the controller removes it
calibration.json                  how quick this machine and the islands are, written by `ddm plan --calibrate`
report.html                       written at the end of every run
artifacts/<stage>-<fingerprint>/  finished, once there is a manifest
work/<stage>-<fingerprint>/       attempt_<n>/ with log, progress, metrics; state/ that outlives attempts: checkpoints
"""

import errno
import json
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ddm_core.artifacts import CorruptArtifact, is_finished, to_jsonable, verify, write_text
from orchestrator.config.schema import RunConfig, parse_config
from orchestrator.errors import RunFolderError
from orchestrator.pipeline.stage import Input, Stage


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The names below one run folder."""

    root: Path

    @property
    def journal(self) -> Path:
        """Events, one JSON object a line."""
        return self.root / "journal.jsonl"

    @property
    def lease(self) -> Path:
        """Who controls the run."""
        return self.root / "controller.json"

    @property
    def stop(self) -> Path:
        """Exists while the run is asked to stop."""
        return self.root / "stop"

    @property
    def islands(self) -> Path:
        """Which islands do not answer; the controller writes it whenever that changes."""
        return self.root / "islands.json"

    def run_id(self) -> str:
        """The name of this run on islands, made up once and kept with it wherever the folder is moved."""
        path = self.root / "run_id"
        if not path.is_file():
            write_text(path, secrets.token_hex(4))
        return path.read_text(encoding="utf-8").strip()

    @property
    def calibration(self) -> Path:
        """How quick this machine and the islands are, for `ddm plan`."""
        return self.root / "calibration.json"

    @property
    def submission(self) -> Path:
        """The latest `ddm submit`, and that its job has found this folder."""
        return self.root / "submission.json"

    @property
    def report(self) -> Path:
        """The report for people."""
        return self.root / "report.html"

    @property
    def tracking(self) -> Path:
        """How far wandb has been told; wandb's own files lie in `wandb/`."""
        return self.root / "tracking"

    def artifact(self, stage: Stage) -> Path:
        """Where the stage's artifact is or will be."""
        return self.root / "artifacts" / stage.folder_name

    def checked(self, stage: Stage, name: str) -> Path:
        """A file of a finished artifact, once it has been compared with its checksum."""
        verify(self.artifact(stage), name)
        return self.artifact(stage) / name

    def input(self, given: Input) -> Path:
        """The folder, or the part of one, that a stage reads."""
        return self.artifact(given.stage) / given.part

    def work(self, stage: Stage) -> Path:
        """All that is known of a stage's attempts."""
        return self.root / "work" / stage.folder_name

    def scratch(self, stage: Stage) -> Path:
        """What the stage keeps between attempts."""
        return self.work(stage) / "state"

    def attempt(self, stage: Stage, number: int) -> Path:
        """What one attempt writes about itself."""
        return self.work(stage) / f"attempt_{number}"

    def attempts(self, stage: Stage) -> list[Path]:
        """All attempts of a stage, the first one first."""
        return sorted(self.work(stage).glob("attempt_*"), key=attempt_number)

    def attempted_stages(self) -> list[list[Path]]:
        """The attempts of every stage that was ever tried here, of earlier configurations too."""
        found = [list(work.glob("attempt_*")) for work in sorted(self.root.glob("work/*"))]
        return [sorted(folders, key=attempt_number) for folders in found if folders]

    def artifact_of(self, attempt: Path) -> Path:
        """Where an attempt's artifact is or will be, also if no configuration names its stage any more."""
        return self.root / "artifacts" / attempt.parent.name

    def scratch_of(self, attempt: Path) -> Path:
        """What an attempt leaves to the next one."""
        return attempt.parent / "state"

    def finished(self, stage: Stage) -> bool:
        """Whether the stage's artifact is whole."""
        return is_finished(self.artifact(stage))

    def clear_unfinished(self) -> None:
        """Delete the temporary folders of attempts that were killed while they published."""
        for folder in self.root.glob("artifacts/.*"):
            shutil.rmtree(folder, ignore_errors=True)

    def save_config(self, config: RunConfig) -> None:
        """Write `config.yaml`."""
        write_text(self.root / "config.yaml", yaml.safe_dump(to_jsonable(config), sort_keys=False))

    def load_config(self) -> RunConfig:
        """The configuration of the latest `ddm run` here; raises `RunFolderError` if this is not a run folder."""
        path = self.root / "config.yaml"
        if not path.is_file():
            raise RunFolderError(f"{self.root} is not a run folder: it has no config.yaml; start one with `ddm run`")
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RunFolderError(f"{path} cannot be read ({error}); write it again with `ddm run folder=…`") from error
        if not isinstance(found, dict):
            raise RunFolderError(f"{path} holds no configuration; write it again with `ddm run folder=…`")
        return parse_config(found)

    def record(self, event: str, **facts: Any) -> None:
        """Append one event to the journal and flush it to the disk."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **to_jsonable(facts)}) + "\n"
        descriptor = os.open(self.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            end = os.lseek(descriptor, 0, os.SEEK_END)
            if os.write(descriptor, line.encode()) < len(line.encode()):
                os.ftruncate(descriptor, end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.journal))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def repair_journal(self) -> None:
        """Cut off a last line that a crash has torn, so that the next event starts a line of its own."""
        if self.journal.is_file():
            whole = self.journal.read_bytes()
            os.truncate(self.journal, whole.rfind(b"\n") + 1)

    def events(self) -> list[dict[str, Any]]:
        """The journal; a last line that was torn by a crash is left out."""
        if not self.journal.is_file():
            return []
        lines = self.journal.read_text(encoding="utf-8").splitlines()
        found = []
        for number, line in enumerate(lines, start=1):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number < len(lines):
                    raise CorruptArtifact(
                        f"{self.journal}, line {number}: {error}; mend or delete that line"
                    ) from error
        return found


def attempt_number(attempt: Path) -> int:
    """The number in the name of an attempt's folder."""
    return int(attempt.name.removeprefix("attempt_"))
