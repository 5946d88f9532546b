"""Send what happens to a run to a webhook: a chat room, a pager, a script.

`python -m orchestrator.reporting.tracking.webhook RUN` follows the journal of one execution, as a child of the
controller (`process.py`). It outlives a killed controller for as long as it takes to report that.
"""

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.config.schema import NotifyConfig, RunConfig
from orchestrator.errors import IslandError
from orchestrator.islands.token import is_confidential, read_token_file
from orchestrator.run.run_folder import RunFolder

TIMEOUT_S, TRIES, POLL_EVERY_S = 3.0, 3, 0.5

SEND_WITHIN_S = TRIES * (TIMEOUT_S + 1.0)
"""Time that the last event has, beyond the end of the run."""


def follow(folder: Path) -> None:
    """Send the events until the controller says `end` or is gone; exit with code 1 if one could not be sent."""
    run = RunFolder(folder)
    config = run.load_config()
    url, seen, ended = read_url(config.notify), len(run.read_events()), threading.Event()
    threading.Thread(target=_wait_for_end, args=(ended,), daemon=True).start()
    is_last, has_run_ended, read_bytes = False, False, -1
    while not is_last:
        is_last = ended.wait(POLL_EVERY_S)
        size = run.journal.stat().st_size if run.journal.is_file() else 0
        if size == read_bytes:
            continue
        events, read_bytes = run.read_events(), size
        for name, text in describe(events[seen:], config):
            has_run_ended = has_run_ended or name in ("finished", "failed", "stopped")
            send(url, config, name, text)
        seen = len(events)
    if not has_run_ended:
        send(url, config, "controller_lost", f"its controller is gone; continue with `ddm resume {config.folder}`")


def _wait_for_end(ended: threading.Event) -> None:
    """Wait for a line of the controller, or for its death."""
    sys.stdin.readline()
    ended.set()


def describe(events: list[dict[str, Any]], config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the name and a sentence of every event of the journal that is sent."""
    for event in events:
        kind = event["event"]
        if kind == "unreachable":
            yield "island_lost", f"island {event.get('island', '')} does not respond"
        elif kind == "left_out":
            yield "expert_lost", f"{event['stage']} failed for good; the ensemble is assembled without it"
        elif kind in ("budget_nearly_reached", "budget_reached"):
            yield kind, event["text"]
        elif kind == "run_ended" and event.get("stopped"):
            yield "stopped", f"it was stopped; continue with `ddm resume {config.folder}`"
        elif kind == "run_ended" and event.get("failed"):
            yield "failed", f"{', '.join(event['failed'])} failed; see `ddm logs {config.folder}`"
        elif kind == "run_ended":
            yield "finished", f"every stage is finished; see {config.folder}/report.html"


def send(url: str, config: RunConfig, name: str, text: str) -> None:
    """Post one event as JSON, unless the configuration leaves it out; raises `OSError` after three tries."""
    import requests

    if name not in config.notify.events:
        return
    payload: Mapping[str, Any] = {
        "text": f"{config.name}: {text}",
        "event": name,
        "run": config.folder,
        "time": time.time(),
    }
    for left in reversed(range(TRIES)):
        try:
            response = requests.post(url, json=payload, timeout=TIMEOUT_S, allow_redirects=False)
            response.raise_for_status()
        except requests.HTTPError as error:
            reason = f"HTTP {error.response.status_code}"
        except requests.RequestException as error:
            reason = type(error).__name__  # the full text shows the address, which is a secret
        else:
            return
        if not left:
            raise OSError(f"the event {name!r} was not accepted: {reason}")
        time.sleep(1.0)


def read_url(config: NotifyConfig) -> str:
    """Return the address of the webhook; raises `IslandError` for a file that others can read, or an unsafe address."""
    url = read_token_file(Path(config.webhook_file).expanduser(), "the address of the webhook")
    if not url.startswith(("https://", "http://")) or not is_confidential(url):
        raise IslandError(f"{config.webhook_file} must hold an https address, or one of this machine")
    return url


if __name__ == "__main__":
    try:
        follow(Path(sys.argv[1]))
    except (OSError, IslandError) as error:
        sys.exit(str(error))
