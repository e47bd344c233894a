"""End a worker process when the process that started it is gone."""

import os
import threading
import time


def end_with(parent: int) -> None:
    """End this process when `parent`, the process that started it, is gone, even if it was killed.

    Does nothing if another process started this one, as for workers of a cluster.
    """
    name = f"end with {parent}"
    if os.getppid() != parent or any(thread.name == name for thread in threading.enumerate()):
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name=name, daemon=True).start()
