"""Inputs that once ended in a traceback, each with the one line that it gets now. ``test_mutations`` finds more."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import mutate
from s2shadow.capture import CaptureError
from s2shadow.capturedtables import engine_table
from s2shadow.recording import read_checks
from s2shadow.sweepspec import SpecError, parse_spec
from s2shadow.trace import TraceError, load_events
from test_mutations import NESTED, PLAIN, TINY_SPEC, Here, files_of, host_trace


@pytest.fixture
def capture(tmp_path):
    """A copy of a capture with some fields of registers.json set: ``capture(source, {path: value})``."""
    def make(source=PLAIN, changes=None):
        for name, content in files_of(source, "capture").items():
            (tmp_path / "capture").mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        registers = json.loads((tmp_path / "capture" / "registers.json").read_bytes())
        for path, value in (changes or {}).items():
            holder = registers
            for key in path[:-1]:
                holder = holder[key]
            holder[path[-1]] = value
        (tmp_path / "capture" / "registers.json").write_text(json.dumps(registers))
        return tmp_path / "capture"
    return make


def add_member(file, name, content):
    """An archive whose member ``name`` is ``content``, with checksums that are right."""
    with zipfile.ZipFile(file) as archive:
        members = {member: archive.read(member) for member in archive.namelist()} | {name: content}
    with zipfile.ZipFile(file, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\x93NUMP\x00"])
def test_a_member_that_is_no_array(refused, capture, content):
    """numpy hands out the bytes of what does not begin as an array does."""
    folder = capture()
    add_member(folder / "tables.npz", "pages.npy", content)
    refused(f"{folder}/tables.npz is damaged: 'pages' is no array", "dump", folder)


def test_saved_events_that_are_no_array(tmp_path):
    np.savez(tmp_path / "events.npz", events=np.zeros(1))
    add_member(tmp_path / "events.npz", "events.npy", b"\0" * 64)
    with pytest.raises(TraceError, match="events must be a one-dimensional array of EVENT_DTYPE"):
        load_events(tmp_path / "events.npz")


def test_more_tables_than_pages(refused, capture):
    """The floor of a storm was measured over as many bytes as registers.json claimed."""
    folder = capture(changes={("vms", 0, "tables_by_level", "3"): 1 << 62})
    refused("counts more tables than the 8 pages of the capture hold", "storm", "--capture", folder)


@pytest.mark.parametrize("vtcr", ["0x0", "0x8000000000000000"])
def test_a_host_table_that_the_engine_refuses(refused, capture, vtcr):
    folder = capture(NESTED, {("l0_table_for_l1", "vtcr_el2"): vtcr})
    refused(f"{folder}: shadow 0 cannot be built: vtcr {vtcr} and vttbr", "dump", folder, "--engine")
    with pytest.raises(CaptureError):
        engine_table(folder, 0)


@pytest.mark.parametrize(("text", "message"), [
    ("[]", "the file must be an object"), ('{"left_out_of_trace": 1.5}', "left_out_of_trace must be a list of names"),
    ('{"ftrace": []}', "ftrace must be an object"), ('{"ftrace": {"map": {}}}', "ftrace.map must be a number"),
    ('{"trap_stream": {"": 1}}', "trap_stream must be keyed as"), ('{"trap_stream": {"TLBI": 1}}', "keyed as"),
    ('{"trap_stream": {"MARK  el1": null}}', "trap_stream.MARK  el1 is missing"), ("{", "is not JSON")])
def test_checks(tmp_path, text, message):
    (tmp_path / "checks.json").write_text(text)
    with pytest.raises(CaptureError, match=message):
        read_checks(tmp_path / "checks.json")


def test_checks_beside_a_trace(refused, tmp_path):
    (tmp_path / "trace.txt").write_bytes(host_trace())
    (tmp_path / "checks.json").write_text('{"ftrace": {"map": {}}}')
    refused(f"{tmp_path}/checks.json: ftrace.map must be a number", "replay", tmp_path)


@pytest.mark.parametrize("text", ["pages = " + "9" * 5000, "seed = " + "[" * 5000, "seed = [" + "{a=" * 5000])
def test_specs_too_long_or_too_deep(tmp_path, text):
    with pytest.raises(SpecError, match=r"^spec\.toml: "):
        parse_spec(text.encode(), "spec.toml", tmp_path)


@pytest.mark.parametrize("argv", [("diff", "9" * 5000, str(PLAIN)), ("walk", "9" * 5000, "0"), ("dump", "9" * 5000),
                                  ("replay", "9" * 5000), ("storm", "--capture", "9" * 5000),
                                  ("sweep", "9" * 5000 + ".toml"), ("walk", str(PLAIN), "0", "--json", "9" * 5000)])
def test_paths_too_long(refused, argv):
    refused("ile name too long", *argv)


def test_the_longest_name(run, tmp_path):
    """One more byte is refused before the work; the name that a file has until it is whole is shorter."""
    for length, wanted in ((255, 0), (256, 2)):
        file = tmp_path / ("x" * (length - 5) + ".json")
        code, out, err = run("tlbi", "ALLE1IS", "--json", file)
        assert (code, bool(out)) == (wanted, not wanted), err
    assert err == f"s2shadow: cannot write {file}: file name too long\n"


def test_a_path_that_may_not_be_looked_at(refused, monkeypatch, tmp_path):
    """Root may look everywhere: so as others see it."""
    def stat(path, **_):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(os, "stat", stat)
    refused(f"cannot read {tmp_path}", "diff", tmp_path, tmp_path)


def test_names_that_are_no_text(tmp_path):
    """Bytes that no encoding has are shown as they must be typed, on a stream that takes only text."""
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")
    (tmp_path / "capture").mkdir()
    for name, content in files_of(PLAIN, "capture").items():
        (tmp_path / name).write_bytes(content)
    os.rename(tmp_path / "capture", odd)
    Path(odd, "spec.toml").write_bytes(b"capture = '.'\nseed = [1, 2]\n")
    out = tmp_path / "out"
    out.mkdir()
    for argv in (("dump", odd, "-o", f"{out}/\udcff"), ("dump", odd), ("dump", odd, "--csv"), ("dump", odd, "--json"),
                 ("dump", odd, "--json", f"{out}/d\udcff.json"), ("diff", odd, odd), ("walk", odd, "0"),
                 ("diff", odd, odd, "--json", f"{out}/d\udcff.json"), ("sweep", f"{odd}/spec.toml", "--list"),
                 ("storm", "--capture", odd, "--events", "2", "--contexts", "1", "--teardown", "reverse-map", "--csv")):
        code, wrong = mutate.answer(argv, tmp_path / "nothing")
        assert wrong is None and code in (0, 1), (argv, wrong)


# --- journals of sweeps ------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(run, tmp_path, monkeypatch):
    """Runs a sweep whose journal has been edited by a function of its records."""
    monkeypatch.setattr("s2shadow.sweep.WorkerPool", Here)
    (tmp_path / "spec.toml").write_bytes(TINY_SPEC)
    journal = tmp_path / "out.csv.journal"
    argv = ("sweep", tmp_path / "spec.toml", "-o", tmp_path / "out.csv", "--json", tmp_path / "out.json")

    def call(edit):
        assert run(*argv)[0] == 0
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        del lines[1]["crc32"]           # as another version may have written it
        edit(lines[1])
        journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run(*argv)
    return call


EDITS = {
    "no policies": lambda record: record["result"].update(policies={}),
    "policies of another kind": lambda record: record["result"].update(policies="x"),
    "a policy that is a number": lambda record: record["result"]["policies"].update({"reverse-map": 1}),
    "a figure in words": lambda record: record["result"]["policies"]["reverse-map"].update(refaults_per_event="x"),
    "a figure that is nan": lambda record: record["result"]["policies"]["reverse-map"].update(events=float("nan")),
    "a cost in words": lambda record: record["result"]["policies"]["reverse-map"].update(total_ns_per_event="1.5"),
    "a cost of nothing": lambda record: record["result"]["policies"]["reverse-map"].update(total_ns_per_event=0),
    "no machine": lambda record: record["result"].pop("machine"),
    "a machine that is none": lambda record: record["result"].update(machine="x"),
    "a CPU that cannot be written": lambda record: record["result"]["machine"].update(cpu="\ud800"),
    "workers in words": lambda record: record.update(workers=[1]),
    "deaths in words": lambda record: record.update(worker_deaths="1"),
    "workers that are an empty list": lambda record: record.update(workers=[]),
    "a host that is none": lambda record: record.update(host=None),
    "no result": lambda record: record.pop("result"),
}


def test_a_flipped_digit_of_a_journal(run, tmp_path, monkeypatch):
    """No other figure: damage."""
    monkeypatch.setattr("s2shadow.sweep.WorkerPool", Here)
    (tmp_path / "spec.toml").write_bytes(TINY_SPEC)
    argv = ("sweep", tmp_path / "spec.toml", "-o", tmp_path / "out.csv")
    assert run(*argv)[0] == 0
    journal = tmp_path / "out.csv.journal"
    whole = journal.read_bytes()
    names = {at for match in re.finditer(rb'"\w+":', whole) for at in range(*match.span())}
    digits = [at for at in range(whole.index(b"\n"), len(whole)) if chr(whole[at]).isdigit() and at not in names]
    for at in digits[::7]:
        journal.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        code, out, err = run(*argv)
        assert (code, out) == (2, "") and err.startswith(f"s2shadow: {journal}: line ") and err.endswith("is damaged\n")
    journal.write_bytes(whole)
    assert run(*argv)[0] == 0


@pytest.mark.parametrize("name", EDITS)
def test_journal(sweep, name):
    code, out, err = sweep(EDITS[name])
    assert (code, out) == (2, "") and "out.csv.journal: a record of another version: " in err and err.count("\n") == 1


# Streams, devices, sizes


def with_closed(descriptor, *argv):
    """The command line in a process that starts with one of its standard streams closed."""
    return subprocess.run([sys.executable, "-m", "s2shadow", *map(str, argv)], text=True, capture_output=True,
                          stdin=subprocess.DEVNULL, timeout=60, preexec_fn=lambda: os.close(descriptor))


@pytest.mark.parametrize("argv", [("diff", "-", PLAIN), ("replay", "-"), ("sweep", "-", "-o", "x.csv")])
def test_closed_stdin(argv):
    done = with_closed(0, *argv)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("s2shadow: stdin")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("argv", [("dump", PLAIN), ("dump", PLAIN, "--json"), ("tlbi", "ALLE1")])
def test_closed_stdout(argv):
    done = with_closed(1, *argv)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "s2shadow: stdout is closed\n")


def test_closed_stderr():
    """A message has nowhere to go then, and does not go among the data."""
    done = with_closed(2, "dump", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    done = with_closed(2, "dump", PLAIN)
    assert done.returncode == 0 and done.stdout


@pytest.mark.parametrize("argv", [("diff", "/dev/zero", PLAIN), ("replay", "/dev/zero"), ("sweep", "/dev/zero")])
def test_a_device(refused, argv):
    """It has no end."""
    refused("cannot read /dev/zero: it is a device", *argv)


def test_one_endless_line(refused, tmp_path):
    (tmp_path / "zeros").write_bytes(bytes(1 << 20))
    refused("zeros: line 1: must be", "diff", tmp_path / "zeros", PLAIN)
    (tmp_path / "dump").write_bytes(b"---[ Guest IPA ]---\n" + bytes(1 << 20))
    refused("dump: line 2: not a range as Linux 7.2 prints it", "diff", tmp_path / "dump", PLAIN)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (b"", "it is empty; sweep --example prints a spec"),
        (b" \n\n", "it is empty; sweep --example prints a spec"),
        (b"pages = [64]\n" + b"a." * 50_000 + b"b = 1\n", "line 2 has a key of more than 100 parts"),
        (b"grid = {" + b"a." * 50_000 + b"b = 1}\n", "line 1 has a key of more than 100 parts"),
        (b"[" + b"a." * 50_000 + b"b]\n", "line 1 has a key of more than 100 parts"),
        (b"#" * ((1 << 20) + 1), "it has more than 1,048,576 bytes"),
        (b"pages = " + b"[" * 5_000, "lists or tables inside each other too deeply"),
        (b'capture = ""\n', "capture: no folder ''"),
        (b'capture = "nowhere"\n', "capture: no folder"),
    ],
)
def test_a_spec_that_is_none(refused, tmp_path, spec, message):
    (tmp_path / "spec.toml").write_bytes(spec)
    refused(message, "sweep", tmp_path / "spec.toml", "-o", tmp_path / "x.csv")
    assert not (tmp_path / "x.csv").exists()


def test_many_numbers_are_no_key(run, tmp_path):
    (tmp_path / "spec.toml").write_text(f"block_mix = [{', '.join(f'0.{n:03}' for n in range(200))}]\n")
    assert run("sweep", tmp_path / "spec.toml", "--list")[0] == 0


def test_out_of_memory(refused, monkeypatch):
    """Wherever it comes from."""
    def none(argv):
        raise MemoryError
    monkeypatch.setattr("s2shadow.cli.dispatch", none)
    refused("out of memory", "dump", PLAIN)


def test_names_that_would_steer_a_terminal(run):
    code, _, err = run("dump", "no\x1b[31m\x07where")
    assert code == 2 and err.isprintable() is False and "\x1b" not in err and "no\\x1b[31m\\x07where" in err


@pytest.mark.parametrize(
    ("message", "argv"),
    [
        ("events must be at most 1,000,000,000, got 99,999,999,999", ("storm", "--synthetic", "--events", 99999999999)),
        ("OP must be a name or an instruction word of 32 bits, got -1", ("tlbi", "--", "-1")),
        ("-o needs the name of a folder", ("dump", PLAIN, "-o", "")),
        (r"'\ud800' is no argument that a system could pass", ("tlbi", "VAE2IS", 1, "--csv", "\ud800")),
        (r"'a\x00b' is no argument that a system could pass", ("dump", PLAIN, "-o", "a\0b")),
    ],
)
def test_names_what_is_wrong(refused, message, argv):
    refused(message, *argv)
