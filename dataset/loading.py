"""Processes that load data: they leave signals to the script that started them, and never outlive it."""

import os
import signal
import threading
import time

from utils import STOP_SIGNALS

CHECK_EVERY_S = 1.0


def follow_the_script(worker: int) -> None:
    """A DataLoader's `worker_init_fn`.

    Schedulers and terminals signal all processes at once. A training script delivers what it has begun before it leaves
    and needs its loading processes until then, so they ignore such signals. They end when the script says so, when it
    is gone, and at the latest when `utils.run_script` ends them.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_after, args=(os.getppid(),), daemon=True).start()


def _leave_after(script: int) -> None:
    # PyTorch looks for its parent too, but not while it waits for room in a pipe that nobody empties any more.
    while os.getppid() == script:
        time.sleep(CHECK_EVERY_S)
    os._exit(1)
