"""Processes that prepare batches."""

import os
import threading
import time


def end_with_parent(worker: int) -> None:
    """End this process once the one that it prepares batches for is gone; for `DataLoader(worker_init_fn=…)`.

    A worker that waits for room in its queue would otherwise outlive a killed run for ever, and keep what it holds of the memory
    and of the device.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
