"""Run a script so that nothing of it outlives the process that started it.

    python training/support/child.py PARENT SCRIPT [arguments]

The script, and whatever processes it starts, are one group. The group ends with the parent, even with one that was killed. (Ours.)
"""

import os
import runpy
import signal
import sys
import threading
import time


def end_group_with(parent: int) -> None:
    """Kill this process's group, which must be its own, within a second of the end of the parent with that id."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_group_with(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
