"""Traces of real hosts, read into arrays of events (``s2shadow.events``).

``read_trace`` reads what users bring: text of ftrace (``trace``, ``trace_pipe``), ``perf script`` or ``trace-cmd
report``; a CSV of executed instructions; files that ``save_events`` wrote. Text and CSV may be gzip or xz.
Traces are untrusted input: what cannot be read is counted, kept as an example, and never an error by itself.
"""

from __future__ import annotations

import gzip
import importlib
import io
import lzma
import os
import stat
import sys
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from s2shadow.engine import TLBI_OP_DTYPE
from s2shadow.events import EVENT_DTYPE, RAW_ROW, UNKNOWN, EventKind, Events, Note, TraceError, fault_access
from s2shadow.inputs import open_input
from s2shadow.report import write_whole
from s2shadow.tracelines import CSV_KINDS, CsvParser, Tally, TextParser, csv_header, shapes

__all__ = ["EVENT_DTYPE", "UNKNOWN", "EventKind", "Events", "Note", "TraceError", "TraceReader", "VMNumbers",
           "fault_access", "load_events", "read_trace", "save_events", "tlbi_ops"]

Progress = Callable[[int, "int | None"], None]

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BLOCK = 1 << 20             # bytes of text that are taken apart at a time; no line is longer
SEARCH_LINES = 100_000      # a file without one event in so many lines is no trace

# --- reading ---------------------------------------------------------------------------------------------------

MAGIC_GZIP, MAGIC_XZ, MAGIC_NPZ, MAGIC_PARQUET = b"\x1f\x8b", b"\xfd7zXZ\x00", b"PK\x03\x04", b"PAR1"
FOREIGN = {
    b"PERFILE2": "a perf.data file: give the text that `perf script` prints",
    b"\x17\x08\x44tracing": "a trace.dat file: give the text that `trace-cmd report` prints",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first",
    b"BZh": "compressed with bzip2: unpack it first",
}
LONGEST_MAGIC = 10


class Source(io.RawIOBase):
    """A binary stream that counts what was read of it, and whose first bytes can be looked at."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.position = 0
        self.start = b""
        while len(self.start) < LONGEST_MAGIC and (more := stream.read(LONGEST_MAGIC - len(self.start))):
            self.start += more
        self.pending = self.start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.pending:
            data, self.pending = self.pending[:len(buffer)], self.pending[len(buffer):]
        else:
            data = getattr(self.stream, "read1", self.stream.read)(len(buffer))     # read1: what a pipe has by now
        buffer[:len(data)] = data
        self.position += len(data)
        return len(data)


class TraceReader(Tally):
    """Iterator over a trace: arrays of ``EVENT_DTYPE``, in the order of the file.

    What has been met so far, and after the last array altogether:

    ==================  =======================================================================================
    name                the file, or ``stdin``
    format              ``"text"``, ``"csv"`` or ``"saved"``
    lines               lines read, 0 for saved events
    rows                rows handed out
    events              {name in the trace: how many}, whether they become rows or not
    unused              those of them that do not (``kvm_entry`` and whatever else was recorded)
    unreadable          lines that are neither events, comments nor headers, or whose event says something unexpected
    unreadable_lines    the first ten of them: (line number, text)
    left_out            what comments say was left out of the file: (line number, event, how many)
    lost                events that the ring buffer lost, as far as the tool says so
    out_of_order        rows whose time is before that of the row before: CPUs are merged more or less well
    truncated           None, or in words where and why reading ended early
    notes               what user space wrote into the trace, at most 65,536 (the ``NOTE`` rows point here)
    ==================  =======================================================================================
    """

    def __init__(self, source: str | os.PathLike[str] | BinaryIO, chunk: int, progress: Progress | None, page: int):
        super().__init__()
        self.name = source_name(source)
        self.format: str | None = None
        self.lines = self.rows = self.out_of_order = 0
        self.truncated: str | None = None
        self._chunk, self._progress, self._page = chunk, progress, page
        self._last_time = 0
        self._arrays = self._read(source)

    def __iter__(self) -> Iterator[Events]:
        return self

    def __next__(self) -> Events:
        return next(self._arrays)

    def close(self) -> None:
        """Give the file back before its end. Reading to the end does so by itself."""
        self._arrays.close()

    @property
    def events(self) -> dict[str, int]:
        """How many of each event there were, by its name in the trace, the most frequent first."""
        return {name.decode(errors="replace"): count for name, count in self.names.most_common()}

    @property
    def unused(self) -> dict[str, int]:
        """Those of ``events`` that become no rows."""
        used = shapes(self._page).keys() | CSV_KINDS.keys()
        return {name.decode(errors="replace"): n for name, n in self.names.most_common() if name not in used}

    # --- from bytes to arrays

    def _read(self, source: str | os.PathLike[str] | BinaryIO) -> Generator[Events, None, None]:
        with opened(source) as raw:
            start = self._start(raw)
            self._total = size_of(raw)
            for magic, what in FOREIGN.items():
                if start.start.startswith(magic):
                    raise TraceError(f"{self.name} is {what}")
            if start.start.startswith((MAGIC_NPZ, MAGIC_PARQUET)):
                self.format = "saved"
                arrays: Iterator[Events] = iter([parse_saved(start.readall(), self.name)])
            else:
                arrays = self._parse(start)
            for array in regroup(arrays, self._chunk):
                self._note_order(array)
                self.rows += len(array)
                yield array

    def _start(self, raw: Any) -> Source:
        try:
            return Source(raw)
        except OSError as error:
            raise TraceError(f"cannot read {self.name}: {error.strerror or error}") from None

    def _parse(self, source: Source) -> Iterator[Events]:
        parser: TextParser | CsvParser | None = None
        for block in self._blocks(source):
            if parser is None:
                block = block.removeprefix(BYTE_ORDER_MARK)
                header = csv_header(block)
                self.format = "text" if header is None else "csv"
                parser = TextParser(self, self._page) if header is None else CsvParser(self, header, self.name)
            rows, lines = parser.parse(block, self.lines + 1)
            self.lines += lines
            if self.lines >= SEARCH_LINES:
                self._expect_events()
            if self._progress is not None:
                self._progress(source.position, self._total)
            if len(rows):
                yield rows
        self._expect_events()

    def _blocks(self, source: Source) -> Iterator[bytes]:
        """Whole lines, about ``BLOCK`` bytes at a time, without the last newline."""
        buffer = bytearray()
        inside_long_line = False
        for piece in self._pieces(source):
            buffer += piece
            if len(buffer) < BLOCK:
                continue
            cut = buffer.rfind(b"\n")
            if inside_long_line and (end := buffer.find(b"\n")) >= 0:
                del buffer[:end + 1]
                inside_long_line = False
                self.lines += 1
                cut = buffer.rfind(b"\n")
            if cut >= 0:
                yield bytes(buffer[:cut])
                del buffer[:cut + 1]
            if len(buffer) >= BLOCK:    # what no line can be: it is not kept
                if not inside_long_line:
                    self.reject(self.lines + 1, bytes(buffer[:200]))
                inside_long_line = True
                buffer.clear()
        if inside_long_line:
            self.lines += 1
            del buffer[:buffer.find(b"\n") + 1 or len(buffer)]
        if self.truncated:      # the last line may lack its end, and a part of a number is another number
            del buffer[buffer.rfind(b"\n") + 1:]
            self.truncated += f" after {self.lines + buffer.count(10):,} lines"
        if buffer:
            yield bytes(buffer).removesuffix(b"\n")

    def _pieces(self, source: Source) -> Iterator[bytes]:
        stream: Any
        if source.start.startswith(MAGIC_GZIP):
            stream, packing = gzip.GzipFile(fileobj=source), "gzip"
        elif source.start.startswith(MAGIC_XZ):
            stream, packing = lzma.LZMAFile(cast(BinaryIO, source)), "xz"
        else:
            stream, packing = io.BufferedReader(source, BLOCK), ""
        some = False
        try:
            while piece := stream.read1(BLOCK):
                some = True
                yield piece
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            what = f"the {packing} data {'ends early' if isinstance(error, EOFError) else 'is damaged'}"
            if not some:
                raise TraceError(f"{self.name} cannot be read: {what}") from None
            self.truncated = what
        except OSError as error:
            raise TraceError(f"cannot read {self.name}: {error.strerror or error}") from None

    def _expect_events(self) -> None:
        if not self.names:
            if self.truncated:
                raise TraceError(f"{self.name} cannot be read: {self.truncated}")
            if not self.lines:
                raise TraceError(f"{self.name} is empty")
            shown = f", line {self.unreadable_lines[0][0]} is {self.unreadable_lines[0][1][:60]!r}" \
                if self.unreadable_lines else ""
            raise TraceError(f"{self.name} is no trace: not one event in {self.lines:,} line"
                             f"{'s' if self.lines > 1 else ''}{shown}")

    def _note_order(self, array: Events) -> None:
        time = array["time"]
        self.out_of_order += int(np.count_nonzero(time[1:] < time[:-1])) + int(time[0] < self._last_time)
        self._last_time = int(time[-1])


def read_trace(source: str | os.PathLike[str] | BinaryIO, *, chunk: int = 65536, progress: Progress | None = None,
               page: int = 4096) -> TraceReader:
    """Read a trace as arrays of at most ``chunk`` rows, in constant memory -> ``TraceReader``.

    ``source``: a file, ``"-"`` for stdin, or an open binary stream; plain, gzip or xz, told apart by the first bytes.
    ``progress(position, size)`` is called now and then with bytes of the file as it is stored (size None: a pipe).
    ``page``: page size of the traced host, for events that count pages. ``TraceError`` if the file cannot be opened,
    or holds no event at all, on the first ``next``.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if page not in (4096, 16384, 65536):
        raise ValueError(f"page must be 4096, 16384 or 65536, got {page}")
    return TraceReader(source, chunk, progress, page)


def source_name(source: str | os.PathLike[str] | BinaryIO) -> str:
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        return "stdin" if name == "-" else name
    return str(getattr(source, "name", "the stream"))


@contextmanager
def opened(source: str | os.PathLike[str] | BinaryIO) -> Iterator[Any]:
    """The binary stream of a source; only what was opened here is closed."""
    if not isinstance(source, (str, os.PathLike)):
        yield source
    elif os.fspath(source) == "-":
        yield sys.stdin.buffer
    else:
        try:
            stream = open_input(source)
        except OSError as error:
            raise TraceError(f"cannot read {source_name(source)}: {error.strerror}") from None
        with stream:
            yield stream


def size_of(stream: Any) -> int | None:
    try:
        status = os.fstat(stream.fileno())
    except (OSError, AttributeError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def regroup(arrays: Iterator[Events], chunk: int) -> Iterator[Events]:
    """The same rows in arrays of ``chunk``, but for the last."""
    waiting: list[Events] = []
    count = 0
    for array in arrays:
        waiting.append(array)
        count += len(array)
        if count >= chunk:
            together = concatenated(waiting)
            whole = count - count % chunk
            yield from np.split(together[:whole], range(chunk, whole, chunk))
            waiting, count = [together[whole:].copy()], count - whole
    if count:
        yield concatenated(waiting)


def concatenated(arrays: list[Events]) -> Events:
    return np.concatenate([array.view(RAW_ROW) for array in arrays]).view(EVENT_DTYPE)


# --- saved events ----------------------------------------------------------------------------------------------


def save_events(file: str | os.PathLike[str], events: Events) -> None:
    """Write ``EVENT_DTYPE[n]`` to ``file``, whole or not at all.

    By its suffix: ``.parquet`` (needs the extra ``trace``), a column per field, or ``.npz`` with one array
    ``events``. ``read_trace`` and ``load_events`` read both.
    """
    if not isinstance(events, np.ndarray) or events.dtype != EVENT_DTYPE or events.ndim != 1:
        raise TypeError("events must be a one-dimensional array of EVENT_DTYPE")
    suffix = os.path.splitext(os.fspath(file))[1]
    data = io.BytesIO()
    if suffix == ".parquet":
        columns = {name: np.ascontiguousarray(events[name]) for name in EVENT_DTYPE.names or ()}
        polars().DataFrame(columns).write_parquet(data)
    elif suffix == ".npz":
        np.savez_compressed(data, events=events)
    else:
        raise ValueError(f"events are saved as .npz or .parquet, not as {os.fspath(file)}")
    write_whole(file, data.getvalue())


def load_events(file: str | os.PathLike[str]) -> Events:
    """Read what ``save_events`` wrote, or a file made like it -> ``EVENT_DTYPE[n]``. Raises ``TraceError``."""
    with opened(file) as stream:
        try:
            data = stream.read()
        except OSError as error:
            raise TraceError(f"cannot read {source_name(file)}: {error.strerror}") from None
    return parse_saved(data, source_name(file))


def parse_saved(data: bytes, name: str) -> Events:
    if data.startswith(MAGIC_PARQUET):
        return parse_parquet(data, name)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            events = archive["events"]
    except KeyError:
        raise TraceError(f"{name}: array 'events' is missing") from None
    except MemoryError:
        raise TraceError(f"{name} is damaged: it declares more data than fits into memory") from None
    except Exception as error:      # zip, zlib, header and format errors have no common base
        raise TraceError(f"{name} is no file of saved events: {first_line(error)}") from None
    # numpy gives the bytes of a member that has no header of its own
    if not isinstance(events, np.ndarray) or events.ndim != 1 or events.dtype.names != EVENT_DTYPE.names:
        raise TraceError(f"{name}: events must be a one-dimensional array of EVENT_DTYPE")
    return converted({field: events[field] for field in EVENT_DTYPE.names or ()}, name)


def parse_parquet(data: bytes, name: str) -> Events:
    reader = polars()
    try:
        frame = reader.read_parquet(io.BytesIO(data))
    except Exception as error:      # polars has its own hierarchy
        raise TraceError(f"{name} is damaged: {first_line(error)}") from None
    if missing := [field for field in EVENT_DTYPE.names or () if field not in frame.columns]:
        raise TraceError(f"{name}: column {missing[0]!r} is missing")
    return converted({field: frame[field].to_numpy() for field in EVENT_DTYPE.names or ()}, name)


def converted(columns: Mapping[str, npt.NDArray[Any]], name: str) -> Events:
    """Rows of columns whose types may differ from EVENT_DTYPE as long as no value does."""
    rows = np.zeros(len(columns["time"]), EVENT_DTYPE)
    for field, values in columns.items():
        if values.dtype.kind not in "iu":
            raise TraceError(f"{name}: {field} must hold whole numbers, got {values.dtype}")
        rows[field] = values.astype(EVENT_DTYPE[field])
        if not np.array_equal(rows[field], values):
            raise TraceError(f"{name}: {field} has numbers that do not fit {EVENT_DTYPE[field]}")
    return rows


def polars() -> Any:
    try:
        return importlib.import_module("polars")
    except ImportError:
        raise TraceError("Parquet needs polars: pip install 's2shadow[trace]'") from None


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# --- what a replay needs of the rows ---------------------------------------------------------------------------


def tlbi_ops(events: Events) -> npt.NDArray[np.void]:
    """The TLBI rows of the CSV as ``TLBI_OP_DTYPE[n]`` for ``vm.tlbi_many``, each with the registers of its row."""
    rows = events[events["kind"] == int(EventKind.TLBI)]
    ops = np.zeros(len(rows), TLBI_OP_DTYPE)
    ops["flags"] = 1
    ops["xt"] = rows["value"]
    for name in ("vcpu", "insn", "vttbr", "vtcr", "hcr"):
        ops[name] = rows[name]
    return ops


class VMNumbers:
    """Numbers the VMs of text events, chunk by chunk.

    The root of a table names its VM until ``DESTROY``; a task that maps, relaxes or loads a table is a vCPU of that VM.
    ``roots`` fixes numbers beforehand ({root: vm}); other roots get the next free number as they appear. Rows without
    a root have their task's VM, and stay ``UNKNOWN`` before the task's first chunk with a table, as do HVA ranges: a
    notifier speaks of a process (see ``Memslots``). In the trace of a host that runs nested guests the root of a
    shadow counts as a VM of its own.
    """

    # by a vCPU's own thread; others, as unmap and age, come from any task
    OWN = tuple(map(int, (EventKind.MAP, EventKind.RELAX, EventKind.MKYOUNG, EventKind.TLB_CPU,
                          EventKind.TLB_IPA_NSH)))
    BY_TASK = tuple(map(int, (
        EventKind.GUEST_FAULT, EventKind.ACCESS_FAULT, EventKind.EXIT, EventKind.SYS_ACCESS, EventKind.NESTED_ERET,
        EventKind.NESTED_EXCEPTION, EventKind.SHADOW_LOOKUP, EventKind.WALK_NESTED, EventKind.INJECT_FAULT,
        EventKind.HANDLE_TLBI)))

    def __init__(self, roots: Mapping[int, int] | None = None):
        self.roots = dict(roots or {})
        self.tasks: dict[int, int] = {}
        self.next = max(self.roots.values(), default=-1) + 1

    def number(self, events: Events) -> Events:
        """Fill ``vm`` of rows that do not know theirs, in place -> the same array."""
        destroyed = np.flatnonzero(events["kind"] == int(EventKind.DESTROY))
        start = 0
        for at in [*destroyed.tolist(), len(events) - 1]:
            self.number_part(events[start:at + 1])
            if at >= 0 and events["kind"][at] == int(EventKind.DESTROY):
                self.roots.pop(int(events["root"][at]), None)
            start = at + 1
        return events

    def number_part(self, rows: Events) -> None:
        """Number rows in place, between two ``DESTROY`` of the same root."""
        open_ = rows["vm"] == UNKNOWN
        with_root = np.flatnonzero(open_ & (rows["root"] != 0))
        roots, first, which = np.unique(rows["root"][with_root], return_index=True, return_inverse=True)
        for root in roots[np.argsort(first)].tolist():
            if root not in self.roots:
                self.roots[root] = self.next
                self.next += 1
        rows["vm"][with_root] = looked_up(self.roots, roots)[which]
        own = np.flatnonzero(np.isin(rows["kind"], self.OWN) & (rows["root"] != 0))
        self.tasks.update(zip(rows["pid"][own].tolist(), rows["vm"][own].tolist(), strict=True))
        by_task = np.flatnonzero(open_ & np.isin(rows["kind"], self.BY_TASK))
        tasks, which = np.unique(rows["pid"][by_task], return_inverse=True)
        rows["vm"][by_task] = looked_up(self.tasks, tasks)[which]


def looked_up(numbers: Mapping[int, int], keys: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    return np.array([min(numbers.get(key, UNKNOWN), UNKNOWN) for key in keys.tolist()], np.uint16)
