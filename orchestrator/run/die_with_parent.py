"""A process that must not outlive whoever started it, however that ended.

Its standard input is a pipe that the other one holds open. When that dies the pipe ends, and this process with it:
nobody is left behind to hold a lease or a Ray cluster's resources.
"""

import os
import signal
import sys
import threading


def die_with_parent() -> None:
    """From now on, SIGKILL this process when its standard input ends; what is left in that is not read by anyone."""
    threading.Thread(target=_wait, daemon=True, name="lifeline").start()


def _wait() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
