"""Damage every file of a finished and of a killed run, run every command on it, and compare with the undamaged run.

A damage is a flipped bit or a missing end. It is *named* if the command says which file or stage is damaged, with an
exit code or a warning. It is *harmless* if the command prints and writes what it does without the damage. Logs, rows of
metrics and a journal that lacks its end are text on which no result depends: they are *shown* as they stand. Everything
else is *silent*, or a *crash*: a traceback, a signal, a timeout.

    python -m benchmarks.testbed.damages --damages 2000
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import Claim
from benchmarks.testbed.forked_commands import Result, import_what_commands_import, run_command, run_forked
from benchmarks.testbed.tiny_run import TINY
from ddm_core.artifacts import MANIFEST, ArtifactError, read_manifest
from orchestrator.cli import app

COMMANDS: dict[str, tuple[tuple[str, ...], int]] = {
    "status": (("status", "RUN"), 10),
    "logs": (("logs", "RUN"), 2),
    "logs of a stage": (("logs", "RUN", "STAGE"), 4),
    "verify": (("verify", "RUN"), 10),
    "sample": (("sample", "RUN", "--seeds", "0-1", "--out", "OUT/grid.png"), 10),
    "experts list": (("experts", "list", "RUN"), 6),
    "experts remove": (("experts", "remove", "RUN", "0", "--out", "OUT/fewer"), 4),
    "plan": (("plan", *TINY, "folder=RUN"), 3),
    "stop": (("stop", "RUN"), 4),
    "resume": (("resume", "RUN"), 10),
    "run": (("run", *TINY, "folder=RUN"), 4),
    "classify": (("classify", "RUN", "--images", "4", "--draws", "1"), 4),
    "report": (("report", "RUN"), 3),
    "evaluate": (("evaluate", "RUN", "--selection", "full"), 1),
    "audit": (("audit", "RUN"), 1),
    "compress": (("compress", "RUN", "quantize=int8_weight_only"), 1),
}
"""Every command that takes a run folder, and how often it is drawn: those that take seconds more rarely."""

CHANGING = ("run", "resume", "evaluate", "audit", "compress")
"""Commands after which the run's artifacts are compared, and not only what they have written."""

TIMES = re.compile(
    r"straggler: [\d.]+ x|\d+(\.\d+)? s\b|\d+:\d\d|in \d+\.\d+|[\d.]+ ms\b|\d+(\.\d+)? MB free|process \d+"
)

NUMBERS = re.compile(r"[0-9a-f]*[0-9][0-9a-f.]*")

CHARTS = re.compile(r"<svg.*?</svg>", re.S)
"""Charts have names of their own in every drawing."""

WORDS_OF_DAMAGE = re.compile(r"damaged|error|corrupt|match|not valid|missing or changed|cannot be read|warning", re.I)

VERDICTS = ("named", "harmless", "shown", "silent", "crash")

SHOWN = {"log.txt", "metrics.jsonl", "journal.jsonl"}
"""Files in `work/`, and the journal, whose text is shown as it stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One damage, one command, and what came of it."""

    run: str
    file: str
    damage: str
    command: str
    verdict: str
    """`named`, `harmless`, `shown`, `silent` or `crash`."""
    output: str


def damages_claims(damages: int = 2000, seed: int = 0) -> list[Claim]:
    """Try this number of damages and return the claim about them."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        trials = list(try_damages(Path(scratch), damages, seed))
    counts = Counter(trial.verdict for trial in trials)
    files = len({(trial.run, trial.file) for trial in trials})
    return [
        Claim(
            name="a flipped bit or a missing end in any file of a finished or killed run, any command",
            bar="named, or harmless: 0 silent, 0 crashes",
            value=", ".join(
                f"{counts[verdict]} {verdict}" for verdict in ("named", "harmless", "shown", "silent", "crash")
            ),
            spread=f"n = {len(trials)} in {files} files, {len(COMMANDS)} commands, {time.monotonic() - started:.0f} s",
            holds=not counts["silent"] and not counts["crash"] and len(trials) >= damages,
        )
    ]


def try_damages(scratch: Path, damages: int, seed: int) -> Iterator[Trial]:
    """Yield the trials; all commands of a kind of run work on a copy at the same path, so outputs can be compared."""
    draws = random.Random(seed)
    os.environ |= {"DDM_HOME": str(scratch / "home"), "COLUMNS": "1000", "OMP_NUM_THREADS": "1"}
    sources = {"finished": scratch / "finished", "killed": scratch / "killed"}
    make_runs(sources)
    expected: dict[tuple[str, str], dict[str, str]] = {}
    place = Place(scratch / "place")
    for kind, source in sources.items():
        for name in COMMANDS:
            place.copy(source)
            line = place.arguments(name, "expert_1")
            if kind == "finished":
                (result,) = import_what_commands_import([line], place.output)
            else:
                result = run_command(line, place.output, timeout_s=120)
            if result.is_crash:
                raise RuntimeError(f"{name} fails on the undamaged {kind} run:\n{result.output}")
            expected[kind, name] = place.observe(result, name)
    files = [(kind, path) for kind, source in sources.items() for path in sorted(source.rglob("*")) if path.is_file()]
    files += [(kind, path) for kind, path in files if path.relative_to(sources[kind]).parts[0] != "artifacts"]
    draws.shuffle(files)
    weights = [weight for _, weight in COMMANDS.values()]
    for number in range(damages):
        kind, path = files[number % len(files)]
        name = draws.choices(list(COMMANDS), weights)[0]
        yield place.attempt(sources[kind], path, name, draws, expected[kind, name])


@dataclass(frozen=True, slots=True)
class Place:
    """The folder in which commands run: a copy of a run, and what they write elsewhere."""

    root: Path

    @property
    def output(self) -> Path:
        """Return the file with a command's text."""
        return self.root / "output"

    def arguments(self, name: str, stage: str) -> list[str]:
        """Return the arguments of a command."""
        words = {"RUN": str(self.root / "run"), "STAGE": stage, "OUT": str(self.root / "out")}
        pattern = re.compile(r"\b(RUN|STAGE|OUT)\b")
        return [pattern.sub(lambda found: words[found[0]], word) for word in COMMANDS[name][0]]

    def copy(self, source: Path) -> None:
        """Replace the run by a copy."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(source, self.root / "run")

    def attempt(self, source: Path, path: Path, name: str, draws: random.Random, expected: dict[str, str]) -> Trial:
        """Damage one file of a copy and run one command."""
        self.copy(source)
        relative = path.relative_to(source)
        content = path.read_bytes()
        damaged, damage = make_damage(content, draws)
        target = self.root / "run" / relative
        times = target.stat()
        target.unlink()
        target.write_bytes(damaged)
        shutil.copymode(path, target)
        os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))
        stage = relative.parts[1].rpartition("-")[0] if relative.parts[0] in ("work", "artifacts") else ""
        result = run_command(self.arguments(name, "expert_1"), self.output, timeout_s=300)
        seen, expected = self.observe(result, name), dict(expected)
        if relative.name == MANIFEST:  # the damage itself is no effect
            seen.pop(relative.parts[1], None)
            expected.pop(relative.parts[1], None)
        verdict = judge(result, seen, expected, (stage, relative.name))
        differences = {key for key in seen | expected if seen.get(key) != expected.get(key)}
        if verdict == "silent":
            self.copy(source)
            control = self.observe(run_command(self.arguments(name, "expert_1"), self.output, timeout_s=300), name)
            verdict = "harmless" if is_same(seen, expected, control) else verdict
        if verdict == "silent" and relative.parts[0] != "artifacts" and relative.name in SHOWN:
            verdict = "shown" if differences <= {"text", "report"} else verdict
        text = f"{sorted(differences)} {result.output[-1500:]}"
        return Trial(run=source.name, file=str(relative), damage=damage, command=name, verdict=verdict, output=text)

    def observe(self, result: Result, name: str) -> dict[str, str]:
        """Return all that a command has produced: its text without times, its files, and the artifacts' checksums."""
        seen = {"code": str(result.code), "text": without_times(result.output)}
        for file in (self.root / "out").rglob("*"):
            if file.is_file() and file.name != MANIFEST:
                seen[str(file.relative_to(self.root))] = digest(file.read_bytes())
        if name == "report" and result.code == 0:
            page = (self.root / "run" / "report.html").read_text()
            seen["report"] = without_times(CHARTS.sub("", page))
        if name in CHANGING:
            for manifest in (self.root / "run" / "artifacts").glob(f"[!.]*/{MANIFEST}"):
                try:
                    seen[manifest.parent.name] = json.dumps(read_manifest(manifest.parent).checksums, sort_keys=True)
                except ArtifactError:
                    seen[manifest.parent.name] = "damaged"
        return seen


def judge(result: Result, seen: dict[str, str], expected: dict[str, str], names: Sequence[str]) -> str:
    """Return the verdict about one command on a damaged run."""
    if result.is_crash:
        return "crash"
    if seen == expected:
        return "harmless"
    usual = set(expected["text"].splitlines())
    new_lines = [line for line in result.output.splitlines() if without_times(line) not in usual]
    known = set(expected.get("report", "").splitlines())
    new_lines += [line for line in seen.get("report", "").splitlines() if line not in known]
    complaint = " ".join(new_lines)  # the title of a table is folded
    is_named = WORDS_OF_DAMAGE.search(complaint) and any(name and name in complaint for name in names)
    return "named" if is_named else "silent"


def is_same(seen: dict[str, str], expected: dict[str, str], control: dict[str, str]) -> bool:
    """Return whether a result equals that without damage; of what time changes, only the words are compared."""
    return seen.keys() == expected.keys() and all(
        seen[key] == expected[key]
        or (control[key] != expected[key] and NUMBERS.sub("#", seen[key]) == NUMBERS.sub("#", expected[key]))
        for key in seen
    )


def make_damage(content: bytes, draws: random.Random) -> tuple[bytes, str]:
    """Flip one bit or cut the end, at a random place."""
    if not content:
        return b"\xff", "one byte in an empty file"
    place = draws.randrange(len(content))
    if draws.random() < 0.35:
        return content[:place], f"cut to {place} of {len(content)} bytes"
    bit = draws.randrange(8)
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :], f"bit {bit} of byte {place}"


def make_runs(folders: dict[str, Path]) -> None:
    """Make a finished run, and one that is killed as soon as its second expert has a checkpoint."""
    for kind, folder in folders.items():

        def run(folder: Path = folder) -> None:
            sys.argv = ["ddm", "run", *TINY, f"folder={folder}"]
            app.main()

        def has_checkpoint(folder: Path = folder) -> bool:
            return any(folder.glob("work/expert_1-*/state/checkpoints/step-*"))

        log = folder.with_suffix(".log")
        if kind == "finished":
            result = run_forked(run, log, timeout_s=300)
        else:
            result = run_forked(run, log, timeout_s=300, until=has_checkpoint)
        if (kind == "finished") != (result.code == 0):
            raise RuntimeError(f"no {kind} run: {result.output}")


def without_times(text: str) -> str:
    """Return a text without times, and without the widths of columns, which depend on them."""
    return re.sub(r"[ ━─]+", "", TIMES.sub("#", text))


def digest(content: bytes) -> str:
    """Return the SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    """Try damages, print those that are neither named nor harmless, and exit with 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--damages", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts, started = Counter[str](), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        for trial in try_damages(Path(scratch), options.damages, options.seed):
            counts[trial.verdict] += 1
            if trial.verdict in ("silent", "crash"):
                print(f"--- {trial.verdict}: {trial.command}, {trial.run}/{trial.file}, {trial.damage}")
                print(trial.output, flush=True)
    print(dict(counts), f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
