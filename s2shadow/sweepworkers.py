"""Where the points of a sweep run: worker processes, Dask clusters, and what happens when a worker dies.

**Fair timing.** Storms that run at once on one machine share its memory bandwidth and its last-level cache, and slow
each other down. One process never runs two storms at once, whatever the executor's threads are.
"""

from __future__ import annotations

import json
import math
import multiprocessing.connection
import multiprocessing.context
import os
import re
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from s2shadow.report import printable
from s2shadow.storm import StormConfig, run

__all__ = ["Crew", "DaskExecutor", "SweepError", "WorkerPool", "dask_executor", "reason", "run_point"]

WAKE_SECONDS = 0.02


class SweepError(RuntimeError):
    """The sweep cannot start or cannot go on; what was finished is kept."""


# --- one point -------------------------------------------------------------------------------------------------

ONE_STORM = threading.Lock()        # threads of one process would wait for each other inside what is timed


def run_point(config: StormConfig) -> dict[str, Any]:
    """Run one storm where the executor put it -> ``{"host", "result"}`` or ``{"host", "error"}``.

    What is wrong with the point itself (its configuration, memory, the engine) comes back as its one-line reason, so
    that an exception out of the executor always means that the worker failed, not the point.
    """
    with ONE_STORM:
        try:
            return {"host": socket.gethostname(), "result": run(config)}
        except Exception as error:
            return {"host": socket.gethostname(), "error": reason(error)}


def reason(error: BaseException) -> str:
    """An exception in one line."""
    text = printable(" ".join(str(error).split()))
    if isinstance(error, MemoryError):
        return f"out of memory: {text}" if text else "out of memory"
    if isinstance(error, BrokenExecutor) or type(error).__name__ == "KilledWorker":
        return "the worker died"
    if isinstance(error, OSError) and error.strerror:
        return printable(error.strerror)
    if isinstance(error, ValueError | RuntimeError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# --- processes -------------------------------------------------------------------------------------------------


class RecordingContext(multiprocessing.context.SpawnContext):
    """Starts processes and remembers them, to be killed."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[multiprocessing.context.SpawnProcess] = []

    def Process(self, *args: Any, **keywords: Any) -> multiprocessing.context.SpawnProcess:  # type: ignore[override]
        process = multiprocessing.context.SpawnProcess(*args, **keywords)
        self.started.append(process)
        return process


class WorkerPool(ProcessPoolExecutor):
    """Worker processes that a Ctrl-C leaves alone, that can be killed, and that do not outlive their parent.

    A Ctrl-C on a terminal reaches all processes of the group: a worker would end its storm early and hand over figures
    of half a storm.
    """

    def __init__(self, workers: int):
        self.children = RecordingContext()
        super().__init__(workers, mp_context=self.children, initializer=settle_worker)

    def submit(self, *args: Any, **keywords: Any) -> Future[Any]:
        # starts workers: with the signal held back, or one that is not settled yet ends in a traceback
        held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            return super().submit(*args, **keywords)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)

    def kill_workers(self) -> None:
        """At once, in the middle of what they do. (Python 3.14 has a method of that name.)"""
        for process in self.children.started:
            process.kill()
        self.shutdown(wait=False, cancel_futures=True)


def settle_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


# --- Dask ------------------------------------------------------------------------------------------------------


@contextmanager
def dask_executor(address: str, timeout: float = 30) -> Iterator[tuple[Executor, int]]:
    """An executor on the Dask cluster at ``address`` (or named by a scheduler file ``….json``), and how many workers it
    has now.

    Every worker must have this version of s2shadow. ``SweepError`` if there is no cluster, no worker within ``timeout``
    seconds, or another version.
    """
    try:
        from distributed import Client
    except ImportError:
        raise SweepError("a sweep on Dask needs distributed, which is not installed: "
                         "pip install 's2shadow[dask]'") from None
    try:
        client = Client(scheduler_address(address), timeout=min(timeout, 10), set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise SweepError(f"no Dask scheduler at {address}: {reason(error)}") from None
    try:
        check_dask_workers(client, address, timeout)
        yield DaskExecutor(client, address), len(client.nthreads())
    finally:
        client.close(timeout=1)


class DaskExecutor(Executor):
    """The client's own executor, but for a lost scheduler: Dask then cancels what is under way, and takes new work and
    never answers. Here new work waits until the client is connected again, or is refused once it has given up.
    """

    def __init__(self, client: Any, address: str):
        self.client, self.address = client, address
        self.inner = client.get_executor(pure=False)

    def submit(self, *args: Any, **keywords: Any) -> Future[Any]:
        while self.client.status == "connecting":
            time.sleep(WAKE_SECONDS)
        if self.client.status != "running":
            raise SweepError(f"lost the Dask scheduler at {self.address}")
        future: Future[Any] = self.inner.submit(*args, **keywords)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.inner.shutdown(wait=wait and not cancel_futures)


def scheduler_address(text: str) -> str:
    """Checked here: ``Client`` waits for a scheduler file for ever, and for long after an address without a port."""
    if text.endswith(".json"):
        try:
            found = json.loads(Path(text).read_bytes())["address"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SweepError(f"cannot use {text} as Dask's scheduler file: {reason(error)}") from None
        text = str(found)
    if not re.search(r":\d+/?$", text):
        raise SweepError(f"a Dask address has a port, such as tcp://10.0.0.1:8786; got {text}")
    return text


def own_version() -> str:
    from importlib.metadata import version

    return version("s2shadow")


def check_dask_workers(client: Any, address: str, timeout: float) -> None:
    from importlib.metadata import version

    try:
        client.wait_for_workers(1, timeout=timeout)
    except TimeoutError:
        raise SweepError(f"the Dask cluster at {address} has no workers") from None
    ours = own_version()
    for worker, theirs in client.run(version, "s2shadow", on_error="return").items():
        if theirs != ours:
            what = "no s2shadow" if isinstance(theirs, Exception) else f"s2shadow {theirs}"
            raise SweepError(f"Dask worker {worker} has {what}; this is {ours}")


# --- points on their way ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class Task:
    config: StormConfig
    deaths: int = 0         # of workers that had it


class Crew:
    """An executor, what is under way on it, and what to do when its workers die.

    A process pool breaks as a whole when one of its workers dies, and does not say which point that worker had. So all
    points that were under way are suspect: they are tried again on a new pool, one by one with nothing beside them, and
    a point that kills its worker every time takes no other point with it.
    """

    def __init__(self, executor: Executor | Callable[[], Executor], retries: int, in_flight: int | None):
        self.make = None if isinstance(executor, Executor) else executor
        self.executor = executor if isinstance(executor, Executor) else executor()
        self.retries = retries
        self.most = math.inf if in_flight is None else in_flight
        self.waiting: deque[Task] = deque()
        self.suspects: deque[Task] = deque()
        self.flying: dict[Future[dict[str, Any]], Task] = {}
        self.ended: SimpleQueue[Future[dict[str, Any]]] = SimpleQueue()
        self.broken = self.alone = False
        self.fresh = True               # nothing was submitted to this executor yet
        self.retried = 0

    def outcomes(self, configs: Sequence[StormConfig]) -> Iterator[tuple[Task, dict[str, Any]]]:
        """Each task with what ``run_point`` returned, or with the error of its last worker, as they end."""
        self.waiting.extend(Task(config) for config in configs)
        self.send()
        while self.flying:
            future = self.next_ended()
            task = self.flying.pop(future)
            try:
                outcome = future.result()
                if outcome.get("result", {}).get("interrupted"):        # an executor whose workers take signals
                    raise InterruptedError("the worker was interrupted")
            except Exception as error:
                failure = self.lost(task, error)
                if failure is not None:
                    yield task, failure
            else:
                yield task, outcome
            self.send()

    def next_ended(self) -> Future[dict[str, Any]]:
        """Wakes up now and then: a library's handler for Ctrl-C (polars has one) can let a wait without end go on."""
        while True:
            try:
                return self.ended.get(timeout=WAKE_SECONDS)
            except Empty:
                continue

    def lost(self, task: Task, error: Exception) -> dict[str, Any] | None:
        """The worker failed: the task goes back into a queue, or failed for good."""
        broken = isinstance(error, BrokenExecutor)
        self.broken |= broken
        task.deaths += 1
        if task.deaths > self.retries:
            times = f", {task.deaths} times" if task.deaths > 1 else ""
            return {"host": None, "error": f"{reason(error)}{times}"}
        self.retried += 1
        (self.suspects if broken else self.waiting).append(task)
        return None

    def send(self) -> None:
        """Submit what there is room for."""
        while True:
            if self.broken:
                if self.flying:         # each of them comes back as lost
                    return
                self.renew()
            queue = self.suspects or self.waiting
            alone = queue is self.suspects or (self.alone and bool(self.flying))
            if not queue or len(self.flying) >= (1 if alone else self.most):
                return
            self.submit(queue)

    def submit(self, queue: deque[Task]) -> None:
        try:
            future = self.executor.submit(run_point, queue[0].config)
        except BrokenExecutor as error:
            if self.fresh:
                raise SweepError(f"the workers cannot be started: {reason(error)}") from None
            self.broken = True
            return
        except SweepError:
            raise
        except Exception as error:
            raise SweepError(f"the executor takes no more work: {reason(error)}") from None
        self.fresh = False
        self.alone = queue is self.suspects
        self.flying[future] = queue.popleft()
        future.add_done_callback(self.ended.put)

    def renew(self) -> None:
        if self.make is None:
            raise SweepError("a worker died and broke the executor: give run_sweep a callable that makes a new one")
        self.executor.shutdown(wait=False)
        self.executor = self.make()
        self.broken, self.fresh = False, True

    def stop(self) -> None:
        """Now: nothing that is under way is waited for."""
        for future in self.flying:
            future.cancel()
        if self.make is not None:
            kill = getattr(self.executor, "kill_workers", None)
            if kill is not None:
                kill()
            self.executor.shutdown(wait=False, cancel_futures=True)

    def dismiss(self) -> None:
        if self.make is not None:
            self.executor.shutdown()
