"""Processes that prepare batches."""

import os
import threading
import time


def end_with_parent(worker: int) -> None:
    """End this process when the process that it prepares batches for has ended. It is for `DataLoader(worker_init_fn=…)`.

    Otherwise a worker of a killed run, which waits for room in its queue, would wait for ever and keep its memory.

    Args:
        worker: The number of the worker, which `DataLoader` passes; it plays no part.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
