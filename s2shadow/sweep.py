"""Sweeps: many storms, over the cross product of their parameters, on any ``concurrent.futures.Executor``.

A **spec** is a TOML file. Its keys are the fields of ``StormConfig``, as the options of ``s2shadow storm`` name them;
a list makes an axis of the cross product. ``EXAMPLE`` (``s2shadow sweep --example``) shows them all.

    capture      folder of a capture, relative to the spec, or "shipped"; without it the tables are generated
    vm           VM of the capture (default: the largest)
    contexts     nested VMs
    pages        canonical 4K pages per context; generated tables only, as the next two
    aliases      nested IPAs that show each page
    block_mix    fraction of the bytes in 2 MiB blocks
    events       events under the reverse map
    event_pages  4K pages per event
    write        touch by writing
    teardown     policies; not an axis: all of them are measured at each point, one after the other
    tlbi         extent of L1's TLBIs
    seed         of the layout and of the events
    seconds      time for each policy other than the reverse map; at least min_events events
    min_events
    track_tlbis  whether the TLB maintenance that L0 owes is recorded

Each table ``[[grid]]`` is a cross product of its own over the keys above it; the points of all grids are run. A key in
a grid takes the place of the key above.

**Results** are one row per point and policy. A finished point goes to a journal beside the output (``OUTPUT.journal``)
before the next one is counted, and the output, CSV or Parquet by its ending, is written from the journal whenever the
sweep ends, by Ctrl-C too. The next run with that output skips what is finished and tries again what failed. Its spec
may have more points or policies than before, not fewer.

**Fair timing.** Storms that run at once on one machine share its memory bandwidth and its last-level cache, and slow
each other down. Each row says where it ran and how many ``workers`` the sweep had. One process never runs two storms
at once, whatever the executor's threads are.
"""

from __future__ import annotations

import difflib
import json
import math
import multiprocessing.connection
import multiprocessing.context
import os
import re
import signal
import socket
import sys
import threading
import time
import tomllib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from s2shadow.journal import Journal, JournalError
from s2shadow.storm import POLICIES, REVERSE_MAP, StormConfig, config_dict, run

__all__ = ["EXAMPLE", "OUTPUT_FORMATS", "Spec", "SpecError", "SweepError", "SweepResult", "WorkerPool",
           "dask_executor", "load_spec", "points", "run_point", "run_sweep"]

EXAMPLE = """\
# A sweep: every combination of these values is one storm ("s2shadow sweep THIS.toml").
# A list makes an axis. What is left out has the default of "s2shadow storm".

contexts  = [1, 4, 16]              # nested VMs
pages     = [4096, 65536]           # canonical 4K pages per context
aliases   = 1                       # nested IPAs that show each page
block_mix = [0.0, 0.5]              # fraction of the bytes in 2 MiB blocks

teardown  = ["reverse-map", "blow-away"]    # measured side by side at each point
seconds   = 1.0                     # for each policy other than the reverse map
seed      = [1, 2]                  # of the layout and of the events

# Each grid is a cross product of its own over what stands above it.

[[grid]]                            # single pages: compaction, KSM, NUMA balancing
event_pages = 1
events      = 2000

[[grid]]                            # a balloon gives 2 MiB back
event_pages = 512
events      = 200

# [[grid]]                          # captured tables in place of generated ones
# capture = "shipped"               # or a folder, relative to this file
"""

OUTPUT_FORMATS = (".csv", ".parquet")
MOST_POINTS = 100_000
RETRIES = 2
WAKE_SECONDS = 0.02
KEYS: dict[str, type] = {
    "capture": str, "vm": int, "contexts": int, "pages": int, "aliases": int, "block_mix": float, "events": int,
    "event_pages": int, "write": bool, "teardown": str, "tlbi": str, "seed": int, "seconds": float, "min_events": int,
    "track_tlbis": bool}
TYPE_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
GENERATED_ONLY = ("pages", "aliases", "block_mix")
SHIPPED = "shipped"

Progress = Callable[[int, int, int], None]


class SpecError(ValueError):
    """The spec cannot be used; the text names the file and the key."""


class SweepError(RuntimeError):
    """The sweep cannot start or cannot go on; what was finished is kept."""


# --- specs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spec:
    """``grids``: per grid its keys with their values, in the order of the file."""

    file: str
    grids: tuple[dict[str, tuple[Any, ...]], ...]


def load_spec(file: str | os.PathLike[str]) -> Spec:
    """Read and check a spec; ``-`` is stdin. ``SpecError`` for anything that is wrong with it."""
    name = "stdin" if os.fspath(file) == "-" else os.fspath(file)
    try:
        data = sys.stdin.buffer.read() if name == "stdin" else Path(file).read_bytes()
    except (OSError, ValueError) as error:
        raise SpecError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from None
    folder = Path(".") if name == "stdin" else Path(file).parent
    return parse_spec(data, name, folder)


def parse_spec(data: bytes, name: str, folder: Path) -> Spec:
    try:
        table = tomllib.loads(data.decode())
    except UnicodeDecodeError:
        raise SpecError(f"{name}: not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{name}: {error}") from None
    grids = table.pop("grid", [{}])
    if not (isinstance(grids, list) and grids and all(isinstance(grid, dict) for grid in grids)):
        raise SpecError(f"{name}: grid must be a table, written [[grid]]")
    shared = check_keys(table, name, folder)
    where = [name if len(grids) == 1 else f"{name}, grid {i}" for i in range(1, len(grids) + 1)]
    spec = Spec(name, tuple(shared | check_keys(grid, at, folder) for grid, at in zip(grids, where, strict=True)))
    check_size(spec)
    for grid, at in zip(spec.grids, where, strict=True):
        try:
            check_sources(grid)
            for _ in grid_points(grid):
                pass
        except ValueError as error:
            raise SpecError(f"{at}: {error}") from None
    return spec


def check_keys(table: dict[str, Any], where: str, folder: Path) -> dict[str, tuple[Any, ...]]:
    """Each key's values as a tuple without repetitions, of the key's type."""
    found = {}
    for key, given in table.items():
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(KEYS)}"
            raise SpecError(f"{where}: no key {key!r}; {hint}")
        values = given if isinstance(given, list) else [given]
        if not values:
            raise SpecError(f"{where}: {key} is an empty list")
        checked = [check_value(key, value, where) for value in values]
        if key == "capture":
            checked = [value if value == SHIPPED else os.path.abspath(folder / value) for value in checked]
        found[key] = tuple(dict.fromkeys(checked))
    return found


def check_value(key: str, value: Any, where: str) -> Any:
    wanted = KEYS[key]
    if wanted is float and type(value) is int:
        value = float(value)
    if not fits(wanted, value):
        raise SpecError(f"{where}: {key} must be {TYPE_WORDS[wanted]}, got {toml_text(value)}")
    if wanted is int and abs(value) >= 1 << 63:
        raise SpecError(f"{where}: {key} must be below 2^63, got {value}")
    return value


def fits(wanted: type, value: Any) -> bool:
    """``true`` is not a whole number here, and ``nan`` and ``inf`` are not numbers."""
    return type(value) is wanted and (not isinstance(value, float) or math.isfinite(value))


def toml_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    return f'"{value}"' if isinstance(value, str) else str(value)


def check_sources(grid: dict[str, tuple[Any, ...]]) -> None:
    if "capture" not in grid:
        if "vm" in grid:
            raise ValueError("vm needs a capture")
        return
    for key in GENERATED_ONLY:
        if key in grid:
            raise ValueError(f"{key} is for generated tables, and capture is given")


def check_size(spec: Spec) -> None:
    count = sum(math.prod(len(values) for key, values in grid.items() if key != "teardown") for grid in spec.grids)
    if count > MOST_POINTS:
        raise SpecError(f"{spec.file}: makes {count:,} points; at most {MOST_POINTS:,}")


def points(spec: Spec) -> list[StormConfig]:
    """The storms of a spec, each once, in the order of the file: the last key changes fastest."""
    merged: dict[StormConfig, tuple[str, ...]] = {}
    for grid in spec.grids:
        for config in grid_points(grid):
            key = point_key(config)
            merged[key] = tuple(dict.fromkeys(merged.get(key, ()) + config.teardown))
    return [replace(key, teardown=teardown) for key, teardown in merged.items()]


def grid_points(grid: dict[str, tuple[Any, ...]]) -> Iterator[StormConfig]:
    """``ValueError`` naming the key at the first value out of its range."""
    teardown = grid.get("teardown", POLICIES)
    axes = {key: values for key, values in grid.items() if key != "teardown"}
    for chosen in product(*axes.values()):
        values = dict(zip(axes, chosen, strict=True))
        capture = values.pop("capture", None)
        yield StormConfig(**values, teardown=teardown, synthetic=capture is None,
                          capture=None if capture == SHIPPED else capture)


def point_key(config: StormConfig) -> StormConfig:
    """What makes two storms the same point: everything but the policies."""
    return replace(config, teardown=(REVERSE_MAP,))


# --- where points run ------------------------------------------------------------------------------------------

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
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"out of memory: {text}" if text else "out of memory"
    if isinstance(error, BrokenExecutor) or type(error).__name__ == "KilledWorker":
        return "the worker died"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, ValueError | RuntimeError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


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


# --- what is finished ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Results:
    """Per point and policy the record of the journal that has it, or the one that says why it failed."""

    finished: dict[tuple[StormConfig, str], dict[str, Any]] = field(default_factory=dict)
    failed: dict[tuple[StormConfig, str], dict[str, Any]] = field(default_factory=dict)

    def add(self, record: dict[str, Any]) -> None:
        """``TypeError`` or ``ValueError`` for a record whose configuration this version does not know."""
        values = record["config"]
        config = StormConfig(**values | {"teardown": tuple(values["teardown"])})
        for policy in config.teardown:
            key = point_key(config), policy
            if "error" in record:
                self.failed[key] = record
            else:
                self.finished[key] = record
                self.failed.pop(key, None)

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]]) -> Results:
        results = cls()
        for record in records:
            results.add(record)
        return results

    def finished_points(self, plan: Sequence[StormConfig]) -> int:
        return sum(not self.missing(config) for config in plan)

    def missing(self, config: StormConfig) -> tuple[str, ...]:
        key = point_key(config)
        return tuple(policy for policy in config.teardown if (key, policy) not in self.finished)

    def rows(self, plan: Sequence[StormConfig]) -> list[dict[str, Any]]:
        """One row per point and policy, all with the same columns, in the order of the plan."""
        rows = []
        for number, config in enumerate(plan, 1):
            key = point_key(config)
            base = self.finished.get((key, REVERSE_MAP))
            for policy in config.teardown:
                record = self.finished.get((key, policy)) or self.failed.get((key, policy))
                if record is not None:
                    rows.append({"point": number, "policy": policy, **config_columns(config),
                                 **outcome_columns(record, policy, base)})
        complete = sorted(rows, key=lambda row: row["error"] is not None)      # columns in the order of a whole row
        names = dict.fromkeys(name for row in complete for name in row)
        return [{name: row.get(name) for name in names} for row in rows]


def config_columns(config: StormConfig) -> dict[str, Any]:
    """``events`` and ``seconds`` are limits here: what was run has columns of its own."""
    values = {item.name: getattr(config, item.name) for item in fields(config)
              if item.name not in ("teardown", "synthetic")}
    if not config.synthetic:
        values |= {"capture": config.capture or SHIPPED} | dict.fromkeys(GENERATED_ONLY)
    limits = ("events", "seconds")
    return {f"{name}_limit" if name in limits else name: value for name, value in values.items()}


def plan_columns(plan: Sequence[StormConfig]) -> list[dict[str, Any]]:
    """What the rows of these points say before any of them has run."""
    return [config_columns(config) for config in plan]


def outcome_columns(record: dict[str, Any], policy: str, base: dict[str, Any] | None) -> dict[str, Any]:
    from s2shadow.report import flatten

    run_columns = {name: record[name] for name in ("host", "workers", "worker_deaths", "finished")}
    if "error" in record:
        return {"error": record["error"], **run_columns}
    result = record["result"]
    measured = result["policies"][policy]
    columns = {name: value for name, value in flatten(measured).items() if name != "interrupted"}
    columns["total_times_reverse_map"] = None if base is None else (
        measured["total_ns_per_event"] / base["result"]["policies"][REVERSE_MAP]["total_ns_per_event"])
    columns |= flatten({"floor": result.get("floor", {})})
    return {"error": None, **columns, **run_columns, **result["machine"]}


@dataclass(frozen=True, slots=True)
class SweepResult:
    """``points`` of the spec: ``before`` of them were finished already, ``finished`` are now, ``failed`` are not, for
    the reason that their rows give (``error``), and the others were not reached. ``retried`` counts the tries that the
    deaths of workers cost. ``rows`` is what the output holds.
    """

    spec: str
    output: str
    points: int
    before: int
    finished: int
    failed: int
    retried: int
    interrupted: bool
    rows: list[dict[str, Any]]


# --- the whole sweep -------------------------------------------------------------------------------------------


def run_sweep(spec: Spec, executor: Executor | Callable[[], Executor], output: str | os.PathLike[str],
              progress: Progress | None = None, retries: int = RETRIES, *, workers: int | None = None,
              in_flight: int | None = None, restart: bool = False) -> SweepResult:
    """Run what is missing of a sweep, and write ``output``: CSV or Parquet, by its ending.

    ``executor`` is any ``concurrent.futures.Executor``, or a callable that makes one. The callable is called again
    when a dead worker has broken the executor, which is how process pools end, and what it makes is shut down at the
    end; an executor of the caller's stays open. At most ``in_flight`` points are handed over at a time (None: all): as
    many as there are workers in a process pool, so that a dead one puts few points in doubt. ``workers`` is only
    recorded.

    A point whose worker dies is tried ``retries`` times more, then it failed; a point that raises failed at once.
    ``progress(done, points, failed)`` is called at the start and after every point. ``KeyboardInterrupt`` ends the
    sweep early; the result says so, and holds what was finished. ``restart`` forgets what ``output`` holds.

    ``SweepError``: the output belongs to another spec or to no sweep, is in use, or the executor is lost. ``OSError``:
    the output or its journal cannot be written.
    """
    check_output(output)
    plan = points(spec)
    journal_path = f"{os.fspath(output)}.journal"
    if not restart and os.path.exists(output) and not os.path.exists(journal_path):
        raise SweepError(f"{os.fspath(output)} is there, but not its journal: choose another output, or restart")
    try:
        with Journal(journal_path, "s2shadow sweep", restart) as journal:
            results = read_results(journal, plan, spec, output)
            return run_missing(plan, results, journal, Crew(executor, retries, in_flight), spec, output, progress,
                               workers)
    except JournalError as error:
        raise SweepError(str(error)) from None


def check_output(output: str | os.PathLike[str]) -> None:
    from s2shadow.report import check_writable

    suffix = Path(output).suffix.lower()
    if suffix not in OUTPUT_FORMATS:
        raise SweepError(f"cannot write {os.fspath(output)}: the name must end in {' or '.join(OUTPUT_FORMATS)}")
    if suffix == ".parquet":
        try:
            import polars  # noqa: F401  now, and not when somebody waits for Ctrl-C to end
        except ImportError:
            raise SweepError("Parquet needs polars, which is not installed: pip install 's2shadow[trace]'") from None
    check_writable(os.fspath(output))


def read_results(journal: Journal, plan: Sequence[StormConfig], spec: Spec, output: str | os.PathLike[str]) -> Results:
    """What is finished already; ``SweepError`` if the plan does not hold all of it."""
    try:
        results = Results.of(journal.records)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise SweepError(f"{journal.path}: a record of another version: {reason(error)}") from None
    wanted = {(point_key(config), policy) for config in plan for policy in config.teardown}
    strange = [key for key in results.finished if key not in wanted]
    if strange:
        config, policy = strange[0]
        raise SweepError(f"{os.fspath(output)} holds results that {spec.file} does not ask for, such as {policy} with "
                         f"{describe(config)}: add them to the spec, choose another output, or restart")
    return results


def describe(config: StormConfig) -> str:
    """The values of a point that are not the defaults."""
    plain = StormConfig(synthetic=config.synthetic)
    values = {name: value for name, value in config_dict(config).items()
              if name not in ("teardown", "synthetic") and value != getattr(plain, name)}
    if config.capture is None and not config.synthetic:
        values["capture"] = SHIPPED
    return ", ".join(f"{name} = {toml_text(value)}" for name, value in values.items()) or "every value as by default"


def run_missing(plan: Sequence[StormConfig], results: Results, journal: Journal, crew: Crew, spec: Spec,
                output: str | os.PathLike[str], progress: Progress | None, workers: int | None) -> SweepResult:
    todo = [replace(config, teardown=missing) for config in plan if (missing := results.missing(config))]
    before = len(plan) - len(todo)
    done, failed, interrupted = before, 0, False
    try:
        if progress is not None:
            progress(done, len(plan), failed)
        for task, outcome in crew.outcomes(todo):
            record = make_record(task, outcome, workers)
            journal.append(record)
            results.add(record)
            failed += "error" in record
            done += 1
            if progress is not None:
                progress(done, len(plan), failed)
        crew.dismiss()
    except KeyboardInterrupt:
        interrupted = True
        crew.stop()
        journal.reread()
        results = Results.of(journal.records)
    except BaseException as error:
        crew.stop()
        write_rows(results.rows(plan), output)
        if isinstance(error, SweepError):
            raise SweepError(f"{error}; {results.finished_points(plan):,} of {len(plan):,} points are in "
                             f"{os.fspath(output)}") from None
        raise
    rows = results.rows(plan)
    write_rows(rows, output)
    return SweepResult(spec.file, os.fspath(output), len(plan), before, results.finished_points(plan),
                       len({row["point"] for row in rows if row["error"] is not None}), crew.retried, interrupted, rows)


def make_record(task: Task, outcome: dict[str, Any], workers: int | None) -> dict[str, Any]:
    record = {"config": config_dict(task.config), "host": outcome["host"], "workers": workers,
              "worker_deaths": task.deaths, "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    if "error" in outcome:
        return record | {"error": outcome["error"]}
    return record | {"result": {name: value for name, value in outcome["result"].items() if name != "config"}}


def write_rows(rows: Sequence[dict[str, Any]], output: str | os.PathLike[str]) -> None:
    """Nothing for no rows. The file is replaced in one step."""
    from s2shadow.report import csv_text, write_whole

    if rows:
        parquet = Path(output).suffix.lower() == ".parquet"
        write_whole(output, parquet_bytes(rows) if parquet else csv_text(rows).encode())


def parquet_bytes(rows: Sequence[dict[str, Any]]) -> bytes:
    """Columns that are empty in every row have a type all the same."""
    import io

    import polars

    types = {str: polars.String, int: polars.Int64, float: polars.Float64, bool: polars.Boolean}
    known = {name: types[kind] for name, kind in KEYS.items()}
    known |= {"error": polars.String, "host": polars.String, "workers": polars.Int64}
    frame = polars.DataFrame(rows, infer_schema_length=None,
                             schema_overrides={name: kind for name, kind in known.items() if name in rows[0]})
    out = io.BytesIO()
    frame.with_columns(polars.selectors.by_dtype(polars.Null).cast(polars.Float64)).write_parquet(out)
    return out.getvalue()
