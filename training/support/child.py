"""Run a script whose processes all end with the process that started it.

    python training/support/child.py PARENT SCRIPT [arguments]

The script and the processes that it starts are one group. The group ends with the parent, also when the parent is killed. (Ours.)
"""

import os
import runpy
import signal
import sys
import threading
import time


def end_group_with(parent: int) -> None:
    """Kill the group of this process within a second after its parent has ended. The group must be the process's own.

    Args:
        parent: The id of the parent.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_group_with(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
