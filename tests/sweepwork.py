"""What the tests of sweeps share, and what they run in worker processes: importable there, unlike a test module."""

import csv
import os
import signal
from concurrent.futures import Executor
from pathlib import Path

from s2shadow.sweep import run_point

TINY = "events = 6\nseconds = 0.001\nmin_events = 2\n"


def read_csv(file):
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


class Deadly(Executor):
    """Hands points on to another executor; the worker that gets one of the ``deadly`` seeds dies.

    With a ``folder`` it dies only the first time: what has killed once has a file there.
    """

    def __init__(self, inner, deadly, folder=None):
        self.inner, self.deadly, self.folder = inner, frozenset(deadly), folder

    def submit(self, run, config):
        assert run is run_point
        return self.inner.submit(run_deadly, config, self.deadly, self.folder)

    def shutdown(self, wait=True, *, cancel_futures=False):
        self.inner.shutdown(wait)


def run_deadly(config, deadly, folder):
    if config.seed in deadly:
        mark = None if folder is None else Path(folder) / str(config.seed)
        if mark is None or not mark.exists():
            if mark is not None:
                mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return run_point(config)
