"""Trace import: files in every state, saved events, memory."""

import bz2
import gzip
import io
import itertools
import lzma
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from s2shadow import trace as tracefile
from s2shadow.events import EVENT_DTYPE
from s2shadow.trace import TraceError, load_events, read_trace, save_events
from traceline import CSV_HEADER, read

SAMPLES = Path(__file__).parent / "data" / "traces"
LONG = os.environ.get("S2SHADOW_LONG") == "1"
BODY = "kvm_access_fault: IPA: 40085000"
EVENT = f"       CPU 1/KVM-150     [001] d..1.    11.052636: {BODY}"

# --- files -------------------------------------------------------------------------------------------------------

TEXT = "".join(f"       CPU 0/KVM-24899   [003] d..1.  {at}.567890: {BODY}\n" for at in range(1, 2001)).encode()


@pytest.fixture(scope="module")
def expected():
    return read(TEXT)[0]


PACKED = {"plain": TEXT, "gzip": gzip.compress(TEXT), "xz": lzma.compress(TEXT),
          "gzip in two": gzip.compress(TEXT[:1000]) + gzip.compress(TEXT[1000:]),
          "xz in two": lzma.compress(TEXT[:1000]) + lzma.compress(TEXT[1000:])}


@pytest.mark.parametrize("packing", PACKED)
def test_packings_by_their_first_bytes(packing, tmp_path, expected, monkeypatch):
    file = tmp_path / "trace.of-any-name"
    file.write_bytes(PACKED[packing])
    seen = []
    reader = read_trace(file, progress=lambda position, size: seen.append((position, size)))
    assert np.array_equal(np.concatenate(list(reader)), expected) and reader.truncated is None
    assert seen[-1] == (len(PACKED[packing]), len(PACKED[packing]))
    assert reader.name == str(file) and reader.lines == reader.rows == 2000

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(PACKED[packing])))
    reader = read_trace("-")
    assert np.array_equal(np.concatenate(list(reader)), expected) and reader.name == "stdin"


def test_a_pipe_that_gives_little_at_a_time(expected):
    read_end, write_end = os.pipe()
    data = gzip.compress(TEXT)
    code = "import os, sys, time\ndata = sys.stdin.buffer.read()\n" \
           "for at in (0, 1, 5, 700): sys.stdout.buffer.write(data[:at]); sys.stdout.flush(); data = data[at:]; " \
           "time.sleep(0.01)\nsys.stdout.buffer.write(data)"
    writer = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=write_end)
    os.close(write_end)
    writer.stdin.write(data)
    writer.stdin.close()
    with open(read_end, "rb") as stream:
        assert np.array_equal(np.concatenate(list(read_trace(stream))), expected)
    assert writer.wait() == 0


@pytest.mark.parametrize("chunk", [1, 7, 999, 1000, 1 << 20])
def test_chunks(chunk, expected):
    arrays = list(read_trace(io.BytesIO(TEXT), chunk=chunk))
    assert [len(array) for array in arrays[:-1]] == [chunk] * (2000 // chunk - (2000 % chunk == 0))
    assert np.array_equal(np.concatenate(arrays), expected)


@pytest.mark.parametrize("block", [100, 128, 1000, 4097])
def test_blocks(block, expected, monkeypatch):
    monkeypatch.setattr(tracefile, "BLOCK", block)
    rows, reader = read(TEXT)
    assert np.array_equal(rows, expected) and reader.lines == 2000


@pytest.mark.parametrize("block", [100, 1000])
def test_lines_that_are_no_lines(block, monkeypatch):
    monkeypatch.setattr(tracefile, "BLOCK", block)
    line = EVENT.encode() + b"\n"
    assert len(line) <= 100
    rows, reader = read(line + b"x" * 5000 + b"\n" + line * 3 + b"y" * 12345 + b"\n" + line + b"z" * 3000)
    assert rows["seq"].tolist() == [1, 3, 4, 5, 7] and reader.lines == 8
    assert [(number, text[0]) for number, text in reader.unreadable_lines] == [(2, "x"), (6, "y"), (8, "z")]


def test_a_last_line_without_an_end(expected):
    rows, reader = read(TEXT[:-1])
    assert np.array_equal(rows, expected) and reader.lines == 2000


@pytest.mark.parametrize(("pack", "name"), [(gzip.compress, "gzip"), (lzma.compress, "xz")])
def test_files_that_end_early(pack, name, expected):
    generator = np.random.default_rng(1)
    lines = [line + b" " + generator.bytes(8).hex().encode() for line in TEXT.splitlines()]     # so that it packs badly
    data = pack(b"\n".join(lines) + b"\n")
    whole, _ = read(data)
    for length in (len(data) - 1, len(data) * 2 // 3, len(data) // 3):
        rows, reader = read(data[:length])
        assert np.array_equal(rows, whole[:len(rows)]) and len(rows) > 200
        assert reader.truncated == f"the {name} data ends early after {reader.lines:,} lines"
        assert reader.lines == len(rows) and reader.unreadable == 0
    with pytest.raises(TraceError, match=f"the stream cannot be read: the {name} data ends early"):
        read(data[:20])


def test_damaged_files():
    for pack, name in ((gzip.compress, "gzip"), (lzma.compress, "xz")):
        data = bytearray(pack(TEXT))
        for at in range(20, len(data), 11):
            broken = bytearray(data)
            broken[at] ^= 0x55
            try:
                _, reader = read(bytes(broken))
            except TraceError as error:
                assert str(error).startswith(f"the stream cannot be read: the {name} data") and "\n" not in str(error)
            else:
                assert reader.truncated and name in reader.truncated


NO_TRACE = {
    "empty": (b"", "is empty"),
    "empty, packed": (gzip.compress(b""), "is empty"),
    "prose": (b"Dear all,\nthere is no trace.\n", r"is no trace: not one event in 2 lines, line 1 is 'Dear all,'"),
    "binary": (bytes(range(256)) * 100, "is no trace"),
    "comments": (b"# tracer: nop\n", "is no trace: not one event in 1 line$"),
    "perf.data": (b"PERFILE2h\0\0\0\0\0\0\0", "is a perf.data file: give the text that `perf script` prints"),
    "trace.dat": (b"\x17\x08\x44tracing6\0", "is a trace.dat file: give the text that `trace-cmd report` prints"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00", "is compressed with zstd: unpack it first"),
    "bzip2": (bz2.compress(TEXT), "is compressed with bzip2: unpack it first"),
    "zip": (b"PK\x03\x04 not quite", "is no file of saved events"),
    "CSV header": (CSV_HEADER.encode(), "is no trace"),
    "other CSV": (b"name,age\nAda,36\n", "is no trace"),
}


@pytest.mark.parametrize("case", NO_TRACE)
def test_files_that_are_no_trace(case, tmp_path):
    data, error = NO_TRACE[case]
    file = tmp_path / "some.file"
    file.write_bytes(data)
    with pytest.raises(TraceError, match=error) as raised:
        list(read_trace(file))
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)


def test_a_large_file_that_is_no_trace_is_given_up_early():
    lines = itertools.count()

    class Endless(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            data = (b"line %d\n" % next(lines)).ljust(len(buffer), b"\n")[:len(buffer)]
            buffer[:len(data)] = data
            return len(data)

    with pytest.raises(TraceError, match="is no trace: not one event"):
        list(read_trace(Endless()))


def test_files_that_cannot_be_opened(tmp_path):
    for file, error in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(TraceError, match=f"cannot read {file}: {error}"):
            list(read_trace(file))
        with pytest.raises(TraceError, match=f"cannot read {file}: {error}"):
            load_events(file)


def test_arguments():
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        read_trace("x", chunk=0)
    with pytest.raises(ValueError, match="page must be"):
        read_trace("x", page=8192)


def test_close_gives_the_file_back(tmp_path):
    file = tmp_path / "trace"
    file.write_bytes(TEXT)
    reader = read_trace(file, chunk=10)
    assert len(next(reader)) == 10
    reader.close()      # a file left open would be a ResourceWarning, which is an error here
    assert list(reader) == []


# --- saved events ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def events():
    with lzma.open(SAMPLES / "g2.tlbi.csv.xz") as table, lzma.open(SAMPLES / "g2.trace.txt.xz") as text:
        return np.concatenate([read(table.read())[0], read(text.read())[0]])


def suffixes():
    try:
        import polars  # noqa: F401
    except ImportError:
        missing = pytest.mark.skip(reason="polars is not installed (extra `trace`)")
        return [".npz", pytest.param(".parquet", marks=missing)]
    return [".npz", ".parquet"]


@pytest.mark.parametrize("suffix", suffixes())
def test_saved_events_come_back(suffix, tmp_path, events):
    file = tmp_path / f"events{suffix}"
    save_events(file, events)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    loaded = load_events(file)
    assert loaded.dtype == EVENT_DTYPE and np.array_equal(loaded, events)
    reader = read_trace(file, chunk=100)
    arrays = list(reader)
    assert {len(array) for array in arrays[:-1]} == {100} and np.array_equal(np.concatenate(arrays), events)
    assert reader.format == "saved" and reader.rows == len(events)
    save_events(file, events[:0])
    assert len(load_events(file)) == 0 and list(read_trace(file)) == []
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(TraceError, match=re.escape(str(file))):
        load_events(file)


@pytest.mark.parametrize("suffix", suffixes())
def test_saved_events_of_other_making(suffix, tmp_path, events):
    """Columns may have wider types, as long as the numbers fit."""
    def write(columns, file):
        if suffix == ".parquet":
            import polars

            polars.DataFrame(columns).write_parquet(file)
        else:
            rows = np.zeros(len(events), [(name, values.dtype) for name, values in columns.items()])
            for name, values in columns.items():
                rows[name] = values
            np.savez(file, events=rows)

    file = tmp_path / f"events{suffix}"
    wide = {name: np.minimum(events[name], (1 << 40) if EVENT_DTYPE[name] == np.uint64 else events[name].max())
            for name in EVENT_DTYPE.names}
    wide = {name: values.astype(np.int64) for name, values in wide.items()}
    write(wide, file)
    loaded = load_events(file)
    assert all(np.array_equal(loaded[name], wide[name]) for name in EVENT_DTYPE.names)
    write(wide | {"cpu": wide["cpu"] + 70000}, file)
    with pytest.raises(TraceError, match="cpu has numbers that do not fit int16"):
        load_events(file)
    write(wide | {"pc": np.full(len(events), 0.5)}, file)
    with pytest.raises(TraceError, match="pc must hold whole numbers, got float64"):
        load_events(file)
    write({name: values for name, values in wide.items() if name != "kind"}, file)
    with pytest.raises(TraceError, match="kind|EVENT_DTYPE"):
        load_events(file)


def test_saved_events_that_are_refused(tmp_path, events):
    with pytest.raises(ValueError, match=r"as \.npz or \.parquet"):
        save_events(tmp_path / "events.json", events)
    for wrong in (events["time"], events.reshape(1, -1), list(events)):
        with pytest.raises(TypeError, match="one-dimensional array of EVENT_DTYPE"):
            save_events(tmp_path / "events.npz", wrong)
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "events.npz"
    for arrays, error in (({"other": events}, "array 'events' is missing"), ({"events": events["time"]}, "EVENT_DTYPE"),
                          ({"events": np.array([{}], object)}, "no file of saved events")):
        np.savez(file, **arrays)
        with pytest.raises(TraceError, match=error):
            load_events(file)
        with pytest.raises(TraceError, match=error):
            list(read_trace(file))


def test_parquet_without_polars(tmp_path, events, monkeypatch):
    monkeypatch.setitem(sys.modules, "polars", None)    # an import of it fails
    with pytest.raises(TraceError, match=r"Parquet needs polars: pip install 's2shadow\[trace\]'"):
        save_events(tmp_path / "events.parquet", events)
    (tmp_path / "made.elsewhere").write_bytes(b"PAR1....")
    with pytest.raises(TraceError, match="needs polars"):
        list(read_trace(tmp_path / "made.elsewhere"))


# --- memory ------------------------------------------------------------------------------------------------------

MEMORY = """
import io, resource, sys
from s2shadow.trace import read_trace

class Lines(io.RawIOBase):
    '''A trace that is made while it is read: half a megabyte of lines, again and again with a new time.'''
    def __init__(self, count):
        self.left, self.at, self.pending = count, 0, b""
    def readable(self):
        return True
    def readinto(self, buffer):
        if not self.pending and self.left:
            many = min(self.left, 4096)
            head = b"       CPU 0/KVM-24899   [003] d..1. %d." % (self.at + 1)
            self.pending = b"".join([head + b"%06d: kvm_guest_fault: ipa 0x40085000, hsr 0x92000007, hxfar 0x40085978, "
                                     b"pc 0x00000040085978\\n" % n for n in range(many)])
            self.at, self.left = self.at + 1, self.left - many
        data, self.pending = self.pending[:len(buffer)], self.pending[len(buffer):]
        buffer[:len(data)] = data
        return len(data)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def run(count):
    rows = 0
    for events in read_trace(Lines(count)):
        rows += len(events)
    assert rows == count, rows

run(70_000)     # every buffer has its size by now
before = peak()
run(int(sys.argv[1]))
print(peak() - before)
"""


def growth(lines):
    """KiB by which the peak of a process grows that reads so many lines."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(lines)], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_memory_is_constant():
    assert growth(300_000) < 24 << 10       # the rows of 300,000 lines alone are 36 MB


@pytest.mark.long
@pytest.mark.skipif(not LONG, reason="S2SHADOW_LONG=1 reads ten million lines")
def test_memory_is_constant_over_ten_million_lines():
    began = time.monotonic()
    grown = growth(10_000_000)
    print(f"10,000,000 lines in {time.monotonic() - began:.0f} s, peak grew by {grown} KiB")
    assert grown < 24 << 10
