"""A trial's controller: `python -m orchestrator.sweeps.child FOLDER` is `ddm resume FOLDER` that ends with its sweep.

Its standard input is a pipe that the sweep holds open and never writes to. When the sweep dies, however it dies, the
pipe ends, and this process with it: nobody is left behind to hold the run's lease. What it leaves is what any killed
controller leaves, and the next one goes on from there.
"""

import os
import signal
import sys
import threading

from orchestrator.cli import main


def end_with_the_sweep() -> None:
    """Wait for the end of standard input, then kill this process."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=end_with_the_sweep, daemon=True, name="lifeline").start()
    sys.argv[1:1] = ["resume"]
    main()
