"""End a process with its parent, whatever ends the parent.

The trick: standard input is a pipe that the parent holds open. When the parent dies, the pipe closes and this process
kills itself. So no orphan holds a lease or a Ray cluster's resources.
"""

import os
import signal
import sys
import threading


def die_with_parent() -> None:
    """Start a thread that discards standard input and sends SIGKILL to this process when it closes."""
    threading.Thread(target=_kill_at_end_of_input, daemon=True, name="die-with-parent").start()


def _kill_at_end_of_input() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
