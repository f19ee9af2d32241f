"""Sweeps: many storms, over the cross product of their parameters, on any ``concurrent.futures.Executor``.

The spec is described in ``sweepspec``, the executors in ``sweepworkers``.

**Results** are one row per point and policy. A finished point goes to a journal beside the output (``OUTPUT.journal``)
before the next one is counted, and the output, CSV or Parquet by its ending, is written from the journal whenever the
sweep ends, by Ctrl-C too. The next run with that output skips what is finished and tries again what failed. Its spec
may have more points or policies than before, not fewer. ``worker_deaths`` of a row are those that reached the sweep:
Dask itself tries a point again a few times before it says so.

**Fair timing.** Storms that run at once on one machine share its memory bandwidth and its last-level cache, and slow
each other down. Each row says where it ran and how many ``workers`` the sweep had. One process never runs two storms
at once, whatever the executor's threads are.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from s2shadow.journal import Journal, JournalError
from s2shadow.storm import REVERSE_MAP, StormConfig, config_dict
from s2shadow.sweepspec import (
    EXAMPLE,
    GENERATED_ONLY,
    KEYS,
    SHIPPED,
    Spec,
    SpecError,
    load_spec,
    point_key,
    points,
    toml_text,
)
from s2shadow.sweepworkers import Crew, SweepError, Task, WorkerPool, dask_executor, reason, run_point

__all__ = ["EXAMPLE", "OUTPUT_FORMATS", "Spec", "SpecError", "SweepError", "SweepResult", "WorkerPool",
           "dask_executor", "load_spec", "points", "run_point", "run_sweep"]

OUTPUT_FORMATS = (".csv", ".parquet")
RETRIES = 2

Progress = Callable[[int, int, int], None]


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
        check_record(record, config)
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


def check_record(record: dict[str, Any], config: StormConfig) -> None:
    """``TypeError``, ``ValueError`` or ``KeyError`` for what would make no row."""
    expect(str, finished=record["finished"])
    expect(int, worker_deaths=record["worker_deaths"])
    expect((int, type(None)), workers=record["workers"])
    if "error" in record:
        expect((str, type(None)), host=record["host"])
        return expect(str, error=record["error"])
    expect(str, host=record["host"])
    result = record["result"]
    for policy in config.teardown:
        measured = result["policies"][policy]
        expect((int, float), total_ns_per_event=measured["total_ns_per_event"])
        expect_numbers(measured)
        if measured["total_ns_per_event"] <= 0:
            raise ValueError(f"total_ns_per_event must be positive, got {measured['total_ns_per_event']}")
    expect_numbers({"floor": result.get("floor", {})})
    for name, value in result["machine"].items():
        expect((str, int, float, type(None)), **{name: value})
    expect(str, cpu=result["machine"]["cpu"])


def expect_numbers(values: dict[str, Any]) -> None:
    from s2shadow.report import flatten

    for name, value in flatten(values).items():
        expect((int, float, type(None)), **{name: value})


def expect(kinds: type | tuple[type, ...], **values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, kinds) or (isinstance(value, float) and not math.isfinite(value)):
            raise TypeError(f"{name} cannot be {value!r}")
        if isinstance(value, str) and not value.isprintable():
            raise ValueError(f"{name} cannot be {value!r}")


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
    deaths of workers cost; ``interrupted``: a Ctrl-C ended it. ``rows`` is what the file ``output`` holds; ``spec`` is
    the file that was run.
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
    journal_path = journal_of(output)
    if not restart and os.path.exists(output) and not os.path.exists(journal_path):
        raise SweepError(f"{os.fspath(output)} is there, but not its journal: choose another output, or restart")
    try:
        with Journal(journal_path, "s2shadow sweep", restart) as journal:
            results = read_results(journal, plan, spec, output)
            return run_missing(plan, results, journal, Crew(executor, retries, in_flight), spec, output, progress,
                               workers)
    except JournalError as error:
        raise SweepError(str(error)) from None


def journal_of(output: str | os.PathLike[str]) -> str:
    """Where the finished points of a sweep are kept."""
    return f"{os.fspath(output)}.journal"


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
        write_whole(output, parquet_bytes(rows) if parquet else csv_text(rows).encode(errors="backslashreplace"))


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
