"""``s2shadow sweep``: many storms from one spec, on this machine or on a Dask cluster."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from s2shadow.commands.common import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    UsageError,
    add_outputs,
    check_outputs,
    error_text,
    number,
    progress_bar,
    text_stream,
    write_output,
)

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from s2shadow.storm import StormConfig
    from s2shadow.sweep import Spec, SweepResult

EXIT_FAILED = 1
PROCESSES, DASK = "processes", "dask:"


def add(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep", help="run many storms from one spec, here or on a Dask cluster", allow_abbrev=False,
        description="Runs a storm at every combination of the values in a spec. Finished points are kept in "
                    "OUTPUT.journal; the same command goes on where it stopped and tries again what failed. Exit code "
                    "1 if any point failed.")
    sweep.set_defaults(run=run)
    sweep.add_argument("spec", metavar="SPEC.toml", nargs="?", help="the spec (- is stdin)")
    sweep.add_argument("--example", action="store_true", help="print a spec to start from, and exit")
    sweep.add_argument("--list", action="store_true", help="print the points, and exit")
    sweep.add_argument("-o", "--output", metavar="FILE",
                       help="results, .csv or .parquet (default: the spec's name with .csv, in this folder)")
    sweep.add_argument("--restart", action="store_true", help="forget what OUTPUT holds")
    where = sweep.add_argument_group("where the points run")
    where.add_argument("--executor", metavar="WHERE", type=executor_name, default=PROCESSES,
                       help="processes, or dask:ADDRESS (tcp://HOST:PORT or a scheduler file .json); default processes")
    where.add_argument("--workers", metavar="N", type=number(1),
                       help="processes at once (default 1: more of them slow each other down, and the figures say so)")
    where.add_argument("--retries", metavar="N", type=number(0), default=2,
                       help="tries more for a point whose worker died (default 2)")
    add_outputs(sweep)
    sweep.add_argument("--plot", metavar="FILE", help="picture (.png, .svg or .pdf)")
    sweep.add_argument("--x", metavar="KEY", help="--plot: what to draw the cost against (default: the number with the "
                                                  "most values)")


def executor_name(text: str) -> str:
    if text != PROCESSES and not (text.startswith(DASK) and text[len(DASK):]):
        raise argparse.ArgumentTypeError(f"must be processes or dask:ADDRESS, got {text!r}")
    return text


def run(options: argparse.Namespace) -> int:
    from s2shadow.sweep import EXAMPLE, SpecError, SweepError, journal_of, load_spec

    if options.example:
        write_output(lambda: print(EXAMPLE, end="", flush=True))
        return EXIT_OK
    if options.spec is None:
        raise UsageError("sweep needs a SPEC.toml; --example prints one")
    try:
        spec = load_spec(options.spec)
    except SpecError as error:
        raise UsageError(str(error)) from None
    if options.list:
        return list_points(spec)
    check_options(options, spec)
    try:
        result = sweep(options, spec)
    except SweepError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        journal = journal_of(options.output)        # any other name is that of a file on its way to the output
        file = journal if error.filename and os.fspath(error.filename) == journal else options.output
        raise UsageError(f"cannot write {file}: {error_text(error)}") from None
    report(options, result)
    if result.interrupted:
        return EXIT_INTERRUPTED
    return EXIT_FAILED if result.failed else EXIT_OK


def check_options(options: argparse.Namespace, spec: Spec) -> None:
    """Refuse now what would fail after the work is done."""
    from s2shadow.sweep import journal_of, plan_columns, points
    from s2shadow.sweepreport import AXES, axes_of

    if options.output is None:
        if options.spec == "-":
            raise UsageError("a spec from stdin needs --output")
        options.output = f"{Path(options.spec).stem}.csv"
    if options.workers is not None and options.executor != PROCESSES:
        raise UsageError("--workers is for --executor processes; a Dask cluster has its own")
    if options.executor == PROCESSES:
        check_captures(points(spec), spec.file)
    check_outputs(options, options.spec, journal_of(options.output), output=options.output)
    if options.x is not None:
        if options.plot is None:
            raise UsageError("--x needs --plot")
        options.x = {"events": "events_limit", "seconds": "seconds_limit"}.get(options.x, options.x)
        axes = axes_of(plan_columns(points(spec)))
        if options.x not in axes and options.x not in AXES:
            raise UsageError(f"--x must be a key of the spec, got {options.x!r}")
        if options.x not in axes:
            raise UsageError(f"--x {options.x}: not varied on its own by {spec.file}; it varies "
                             f"{', '.join(axes) or 'nothing'}")


def check_captures(plan: list[StormConfig], file: str) -> None:
    """Here and not in every point: the workers see the same files."""
    for folder in dict.fromkeys(config.capture for config in plan if config.capture is not None):
        if not Path(folder).is_dir():
            raise UsageError(f"{file}: capture: no folder {os.fspath(folder)}")


def list_points(spec: Spec) -> int:
    from s2shadow.report import Line, columns, emit
    from s2shadow.sweep import plan_columns, points
    from s2shadow.sweepreport import value_text

    plan = points(spec)
    rows = plan_columns(plan)
    varied = [name for name in rows[0] if len({row[name] for row in rows}) > 1]
    table = [["point", *varied, "policies"]]
    for i, (config, row) in enumerate(zip(plan, rows, strict=True), 1):
        table.append([str(i), *(value_text(row[name]) for name in varied), " ".join(config.teardown)])
    write_output(lambda: emit(map(Line, columns(table)), sys.stdout))
    return EXIT_OK


def sweep(options: argparse.Namespace, spec: Spec) -> SweepResult:
    from s2shadow.sweep import check_output, run_sweep

    check_output(options.output)
    with executor(options) as (make, workers, in_flight), progress_bar(sys.stderr, PointsBar, PointsCounter) as show:
        return run_sweep(spec, make, options.output, show, options.retries, workers=workers, in_flight=in_flight,
                         restart=options.restart)


@contextmanager
def executor(options: argparse.Namespace) -> Iterator[tuple[Executor | Callable[[], Executor], int, int]]:
    """What takes the points, how many workers it has, and how many points to hand over ahead."""
    from s2shadow.sweep import WorkerPool, dask_executor

    if options.executor == PROCESSES:
        workers = options.workers or 1
        yield lambda: WorkerPool(workers), workers, workers
    else:
        quieten_dask()
        with dask_executor(options.executor[len(DASK):]) as (cluster, workers):
            yield cluster, workers, max(64, 8 * workers)    # a cluster may grow


def quieten_dask() -> None:
    """Its log repeats in many lines what ends up in one of ours."""
    import logging

    try:
        import distributed  # noqa: F401  sets the levels of its loggers
    except ImportError:
        return
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] in ("distributed", "tornado"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def report(options: argparse.Namespace, result: SweepResult) -> None:
    from s2shadow.report import csv_text, emit, write_json, write_text
    from s2shadow.sweepreport import measured, plot, summary_lines

    stream = text_stream(options)
    if stream is not None:
        lines = summary_lines(result, hints=options.plot is None)
        write_output(lambda: emit(lines, stream))
    if options.json is not None:
        write_output(lambda: write_json(result_json(result), options.json), options.json)
    if options.csv is not None and result.rows:
        write_output(lambda: write_text(csv_text(result.rows), options.csv), options.csv)
    if options.plot is not None and measured(result.rows) and not result.interrupted:
        write_output(lambda: plot(result.rows, options.plot, options.x), options.plot)


def result_json(result: SweepResult) -> dict[str, Any]:
    return {"schema": 1, **{name: getattr(result, name) for name in result.__dataclass_fields__}}


# --- progress --------------------------------------------------------------------------------------------------


class PointsCounter:
    """One line on a terminal that counts the points, and is gone when the work is done."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.began = time.monotonic()
        self.before: int | None = None

    def __enter__(self) -> Callable[[int, int, int], None]:
        return self.show

    def __exit__(self, *exception: object) -> None:
        self.stream.write("\r\x1b[K")
        self.stream.flush()

    def show(self, done: int, points: int, failed: int) -> None:
        if self.before is None:
            self.before = done
        self.stream.write(f"\r\x1b[K{points_text(done, points, failed)}{self.left(done, points)}")
        self.stream.flush()

    def left(self, done: int, points: int) -> str:
        ran = done - (self.before or 0)
        if not ran or done == points:
            return ""
        seconds = (time.monotonic() - self.began) / ran * (points - done)
        return f", about {duration_text(seconds)} left"


class PointsBar:
    """The same with rich."""

    def __init__(self, stream: TextIO):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(file=stream)
        self.progress = Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
                                 TextColumn("{task.fields[left]}"), console=console, transient=True,
                                 refresh_per_second=2)
        self.counter = PointsCounter(stream)
        self.task = self.progress.add_task("", total=None, left="")

    def __enter__(self) -> Callable[[int, int, int], None]:
        self.progress.start()
        return self.show

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def show(self, done: int, points: int, failed: int) -> None:
        if self.counter.before is None:
            self.counter.before = done
        self.progress.update(self.task, description=points_text(done, points, failed), completed=done, total=points,
                             left=self.counter.left(done, points).lstrip(", "))


def points_text(done: int, points: int, failed: int) -> str:
    return f"{done:,} of {points:,} points{f', {failed:,} failed' if failed else ''}"


def duration_text(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.0f} h"
