"""The run folder, which holds all state of a run. Only this file knows the names in it.

config.yaml                       checksum, format version, and the composed configuration of the latest `ddm run`
config.<number>.yaml              configurations of finished runs that `ddm run --replace` has kept
config.signature                  proof that this user wrote the configuration on this machine
journal.jsonl                     events, append-only
controllers/<generation>.json     the controllers that have held the run's lease, the present one last
run_id                            eight hex digits that name this run on islands
islands.json                      the islands that do not respond
submission.json                   the latest `ddm submit`, and the confirmation of its job
wheels/                           the code as it was sent to islands
stop                              a stop request; the controller removes it
calibration.json                  speed of this machine and the islands, written by `ddm plan --calibrate`
report.html                       written at the end of every run
artifacts/<stage>-<fingerprint>/  finished when it has a manifest
work/<stage>-<fingerprint>/       attempt_<n>/ with log, progress, metrics; state/ with the checkpoints of all attempts
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired

import yaml
from pydantic import FiniteFloat
from typing_extensions import TypedDict

from ddm_core.artifacts import CorruptArtifact, is_finished, read_small_file, to_jsonable, verify, write_text
from ddm_core.json_values import from_json
from orchestrator.config.schema import RunConfig, parse_config
from orchestrator.errors import RunFolderError
from orchestrator.pipeline.stage import Input, Stage
from orchestrator.run.signature import sign

TEMPORARY = re.compile(r"\.[\w.]+-[0-9a-f]{12}(\.\d+){1,2}")
"""Name of a temporary artifact folder, `.<stage>-<fingerprint>.<pid>`, or of one that is written to replace it."""

CHECKSUM_OF_LINE = ', "crc32": "'
"""What comes before the checksum of an event in the journal; events of earlier versions have none."""

ATTEMPT = re.compile(r"attempt_[0-9]{1,9}")
"""Name of an attempt's folder."""

CONFIG_SEAL = "# written by ddm; do not edit; sha256 of the rest: "
"""First line of config.yaml, before the checksum."""

FORMAT = 2
"""Version of the names and keys in a run folder, stored in config.yaml; folders without a version are format 1."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of one run folder."""

    root: Path

    @property
    def journal(self) -> Path:
        """Return the journal: events, one JSON object per line."""
        return self.root / "journal.jsonl"

    @property
    def controllers(self) -> Path:
        """Return the folder of the lease: one file per controller that has held it, with a heartbeat."""
        return self.root / "controllers"

    @property
    def stop(self) -> Path:
        """Return the file that exists while a stop is requested."""
        return self.root / "stop"

    @property
    def islands(self) -> Path:
        """Return the file with the islands that do not respond; the controller writes it on every change."""
        return self.root / "islands.json"

    @property
    def config_file(self) -> Path:
        """Return the file with the run's configuration and its checksum."""
        return self.root / "config.yaml"

    @property
    def signature(self) -> Path:
        """Return the file that records which user wrote the configuration."""
        return self.root / "config.signature"

    def run_id(self) -> str:
        """Return the run's name on islands; it is generated once and moves with the folder."""
        path = self.root / "run_id"
        if not path.is_file():
            write_text(path, secrets.token_hex(4))
        return path.read_text(encoding="utf-8").strip()

    @property
    def calibration(self) -> Path:
        """Return the file with the speeds of this machine and the islands, for `ddm plan`."""
        return self.root / "calibration.json"

    @property
    def submission(self) -> Path:
        """Return the file with the latest `ddm submit` and the confirmation of its job."""
        return self.root / "submission.json"

    @property
    def report(self) -> Path:
        """Return the HTML report."""
        return self.root / "report.html"

    @property
    def tracking(self) -> Path:
        """Return the folder with what the tracker has recorded; the files of wandb are in `wandb/`."""
        return self.root / "tracking"

    def artifact(self, stage: Stage) -> Path:
        """Return the folder of the stage's artifact, finished or not."""
        return self.root / "artifacts" / stage.folder_name

    def verify_file(self, stage: Stage, name: str) -> Path:
        """Compare a file of a finished artifact with its checksum and return its path."""
        verify(self.artifact(stage), name)
        return self.artifact(stage) / name

    def input_folder(self, source: Input) -> Path:
        """Return the folder, or the part of one, that a stage reads."""
        return self.artifact(source.stage) / source.part

    def work(self, stage: Stage) -> Path:
        """Return the folder of all attempts of a stage."""
        return self.root / "work" / stage.folder_name

    def scratch(self, stage: Stage) -> Path:
        """Return the folder that the stage's attempts share, such as for checkpoints."""
        return self.work(stage) / "state"

    def attempt(self, stage: Stage, number: int) -> Path:
        """Return the folder of one attempt."""
        return self.work(stage) / f"attempt_{number}"

    def attempts(self, stage: Stage) -> list[Path]:
        """Return the folders of a stage's attempts, oldest first."""
        return _list_attempts(self.work(stage))

    def attempted_stages(self) -> list[list[Path]]:
        """Return the attempts of every stage that was ever started here, also of earlier configurations."""
        return [attempts for work in sorted(self.root.glob("work/*")) if (attempts := _list_attempts(work))]

    def artifact_of_attempt(self, attempt: Path) -> Path:
        """Return the folder of an attempt's artifact, also if no configuration names its stage any more."""
        return self.root / "artifacts" / attempt.parent.name

    def scratch_of_attempt(self, attempt: Path) -> Path:
        """Return the folder that an attempt shares with the next ones."""
        return attempt.parent / "state"

    def is_finished(self, stage: Stage) -> bool:
        """Return whether the stage's artifact is complete."""
        return is_finished(self.artifact(stage))

    def clear_unfinished(self) -> None:
        """Delete the temporary folders of attempts that were killed while they published, and nothing else.

        `artifacts` may be a link to another disk, where other things may be too: only names of our own form count.
        """
        artifacts = self.root / "artifacts"
        for entry in os.scandir(artifacts) if artifacts.is_dir() else ():
            if TEMPORARY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)

    def save_config(self, config: RunConfig) -> None:
        """Write and sign `config.yaml`; raises `RunFolderError` if an earlier version of ddm wrote the folder."""
        with contextlib.suppress(OSError, yaml.YAMLError, UnicodeDecodeError):
            self._check_format(_load_yaml(self.config_file.read_text(encoding="utf-8")))
        text = yaml.safe_dump({"format": FORMAT} | to_jsonable(config), sort_keys=False)
        write_text(self.config_file, f"{CONFIG_SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
        sign(self.config_file, self.signature)

    def archive_config(self) -> Path:
        """Copy the configuration, which the next one replaces, to `config.<number>.yaml`, and return that path."""
        numbers = [int(path.name.split(".")[1]) for path in self.archived_configs()]
        archived = self.root / f"config.{max(numbers, default=0) + 1}.yaml"
        write_text(archived, self.config_file.read_text(encoding="utf-8"))
        return archived

    def archived_configs(self) -> list[Path]:
        """Return the configurations that `ddm run --replace` moved aside, the latest first."""
        paths = [path for path in self.root.glob("config.*.yaml") if path.name.split(".")[1].isdecimal()]
        return sorted(paths, key=lambda path: int(path.name.split(".")[1]), reverse=True)

    def load_config(self, archived: Path | None = None) -> RunConfig:
        """Return the latest configuration, or an archived one.

        Raises `RunFolderError` for no run folder or one of another format.
        """
        path = archived or self.config_file
        if not path.is_file():
            raise RunFolderError(f"{self.root} is not a run folder: it has no config.yaml; start one with `ddm run`")
        try:
            text = read_small_file(path).decode()
            contents = _load_yaml(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise RunFolderError(f"{path} cannot be read ({error}); write it again with `ddm run folder=…`") from error
        if not isinstance(contents, dict):
            raise RunFolderError(f"{path} holds no configuration; write it again with `ddm run folder=…`")
        self._check_format(contents)
        seal, _, sealed = text.partition("\n")
        if seal != f"{CONFIG_SEAL}{hashlib.sha256(sealed.encode()).hexdigest()}":
            raise RunFolderError(
                f"{path} does not match its checksum: it is damaged or was edited by hand; pass a changed setting as "
                f"an override, `ddm run … folder={self.root} key=value`"
            )
        return _parse_settings(text)

    def _check_format(self, contents: Any) -> None:
        """Raise `RunFolderError` if the contents of `config.yaml` have another format than this version's."""
        version = contents.get("format", 1) if isinstance(contents, dict) else FORMAT
        if version != FORMAT:
            age = "a later" if isinstance(version, int) and version > FORMAT else "an earlier"
            raise RunFolderError(
                f"{self.root} was written by {age} version of ddm (format {version}; this version reads {FORMAT}): "
                "start a new run in another folder, or use the version that made it"
            )

    def request_stop(self) -> None:
        """Request a stop from the run's controller."""
        os.close(_open_regular(self.stop, os.O_WRONLY | os.O_CREAT))

    def record(self, event: str, **facts: Any) -> None:
        """Append one event to the journal and flush it to the disk."""
        text = json.dumps({"time": round(time.time(), 3), "event": event, **to_jsonable(facts)})
        line = f'{text[:-1]}{CHECKSUM_OF_LINE}{_checksum(text)}"}}\n'
        descriptor = _open_regular(self.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            end = os.lseek(descriptor, 0, os.SEEK_END)
            if os.write(descriptor, line.encode()) < len(line.encode()):
                os.ftruncate(descriptor, end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.journal))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def repair_journal(self) -> None:
        """Remove an incomplete last line that a crash left, so that the next event starts on a new line."""
        if not self.journal.exists() and not self.journal.is_symlink():
            return
        descriptor = _open_regular(self.journal, os.O_RDWR)
        with os.fdopen(descriptor, "r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)

    def read_events(self) -> list[dict[str, Any]]:
        """Return the journal's events, without an incomplete last line that a crash left."""
        if not self.journal.is_file():
            return []
        lines = read_small_file(self.journal).decode(errors="replace").split("\n")
        events = []
        for number, line in enumerate(lines, start=1):
            try:
                events.append(_parse_event(line))
            except (ValueError, RecursionError) as error:
                if number < len(lines):
                    raise CorruptArtifact(
                        f"{self.journal}, line {number}: {error}; correct or delete that line"
                    ) from error
        return events


class _Event(TypedDict):
    """The facts of an event that commands use; it may have others."""

    event: str
    time: NotRequired[FiniteFloat]
    stage: NotRequired[str]
    fingerprint: NotRequired[str]
    attempt: NotRequired[int]
    bytes: NotRequired[int]
    direction: NotRequired[Literal["in", "out"]]


def _parse_event(line: str) -> dict[str, Any]:
    """Return one event of the journal; raises `ValueError` if it is damaged or no event."""
    event = json.loads(line)
    from_json(_Event, event)
    if "crc32" in event:
        text, _, _ = line.rpartition(CHECKSUM_OF_LINE)
        if line != f'{text}{CHECKSUM_OF_LINE}{_checksum(text + "}")}"}}':
            raise ValueError("it does not match its checksum")
    return dict(event)


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


@functools.lru_cache(maxsize=8)
def _load_yaml(text: str) -> Any:
    """Parse YAML; a command loads its configuration several times, so the last texts are kept."""
    return yaml.load(text, yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader)


@functools.lru_cache(maxsize=8)
def _parse_settings(text: str) -> RunConfig:
    return parse_config({key: value for key, value in _load_yaml(text).items() if key != "format"})


def _open_regular(path: Path, flags: int) -> int:
    """Open a file of the run folder for writing; raises `RunFolderError` for a link, a pipe or a device.

    A run folder may come from anyone: a link in it must not lead a command to a file outside.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise RunFolderError(f"{path} is not a regular file; replace it with one, or delete it") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode) or os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        raise RunFolderError(f"{path} is not a regular file of its own; replace it with one, or delete it")
    return descriptor


def _list_attempts(work: Path) -> list[Path]:
    """Return the folders of the attempts below a stage's folder, oldest first."""
    return sorted(
        (path for path in work.glob("attempt_*") if ATTEMPT.fullmatch(path.name) and path.is_dir()), key=attempt_number
    )


def attempt_number(attempt: Path) -> int:
    """Return the number in the name of an attempt's folder."""
    return int(attempt.name.removeprefix("attempt_"))
