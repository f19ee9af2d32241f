"""``s2shadow replay``: what it prints and writes, its exit codes, and one line for everything that is wrong."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from s2shadow import replayreport
from s2shadow.cli import main
from s2shadow.replay import ReplayConfig, run
from test_replay import GUEST, HOST_VA, PAGE, PAGES, compose
from tracetext import Trace

SLOT = f"gpa=0x{GUEST:x},hva=0x{HOST_VA:x},size={PAGES * PAGE // 1024}K"


@pytest.fixture
def call(run):
    """``run`` of this command."""
    return partial(run, "replay")


@pytest.fixture
def refused_replay(refused):
    """``refused`` for this command."""
    return lambda message, *argv: refused(message, "replay", *argv)


@pytest.fixture
def nested(tmp_path):
    """A short trace of an L0: one page touched, taken away by the host together with its neighbour, touched again."""
    trace = Trace()
    trace.enter_l2(0)
    for page in (0, 1, 2):
        trace.fault(0, GUEST + page * PAGE)
    trace.unmap_hva(HOST_VA, HOST_VA + 2 * PAGE)
    for page in (0, 2):
        trace.fault(0, GUEST + page * PAGE)
    return trace.write(tmp_path / "trace.txt")


@pytest.fixture(scope="module")
def capture(tmp_path_factory):
    return compose(tmp_path_factory.mktemp("cli") / "b_thp", "b_thp")


def test_table(call, nested):
    code, out, err = call(nested, "--memslot", SLOT, "--teardown", "reverse-map,blow-away")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("trace        trace.txt, a host (L0) that runs a guest hypervisor:")
    assert lines[1] == "replayed     5 touches by L2, 0 TLBIs of L1, 1 MMU notifier, 1 change of L1's memory"
    assert lines[3].split()[:5] == ["policy", "faults", "needless", "dropped", "required"]
    assert lines[4].split()[:5] == ["reverse-map", "4", "0", "2", "2"]
    assert lines[5].split()[:5] == ["blow-away", "5", "1", "3", "2"]
    assert "262,144" in lines[5]
    assert "one change" in out and "the host takes 8.0 KiB at 0x40000000 (UNMAP)" in out
    assert "blow-away dropped 1 leaf that nothing required, and served 1 fault for it again." in out
    assert lines[-1] == "JSON: --json FILE   picture: --plot FILE   page: --report FILE"
    assert max(map(len, lines)) <= 125


def test_table_of_a_capture(call, capture):
    code, out, _ = call(capture, "--teardown", "reverse-map")
    assert code == 0
    assert "a host that plays L1" in out and "edits of L1's tables" in out
    assert "checked      L1's tables as captured: 3 of 3 snapshots, 78,338 of 78,338 pages" in out
    assert "change p50" not in out          # L1's own notifiers change nothing below it


def test_difference_is_exit_code_1(call, capture, tmp_path):
    folder = tmp_path / "capture"
    folder.mkdir()
    for source in capture.iterdir():
        (folder / source.name).symlink_to(source)
    (folder / "checks.json").write_text(json.dumps({"ftrace": {"map": 1}, "left_out_of_trace": []}))
    code, out, _ = call(folder, "--teardown", "reverse-map")
    assert code == 1
    assert "checked      events as counted in checks.json: 0 of 1 (map 80 of 1)" in out


def test_json_and_csv(call, nested, tmp_path):
    file = tmp_path / "result.json"
    code, out, _ = call(nested, "--memslot", SLOT, "--json", file, "--csv")
    assert code == 0
    result = json.loads(file.read_text())
    assert result["schema"] == 1
    assert result["config"]["memslots"] == [{"gpa": GUEST, "hva": HOST_VA, "size": PAGES * PAGE, "vm": 0}]
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["policy"] for row in rows] == list(result["policies"])
    for row, figures in zip(rows, result["policies"].values(), strict=True):
        assert int(row["faults_mapped"]) == figures["faults"]["mapped"]
        assert float(row["teardown_ns_p50"]) == figures["teardown"]["ns"]["p50"]
        assert row["tlbi_ns_p50"] == ""     # there was none


def test_stdin(nested, call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(nested.read_bytes())))
    code, out, _ = call("-", "--memslot", SLOT)
    assert code == 0 and out.startswith("trace        stdin, ")


def test_plot(call, nested, tmp_path):
    pytest.importorskip("matplotlib")
    for name, magic in (("picture.png", b"\x89PNG"), ("picture.svg", b"<?xml"), ("picture.pdf", b"%PDF")):
        code, _, _ = call(nested, "--memslot", SLOT, "--plot", tmp_path / name)
        assert code == 0 and (tmp_path / name).read_bytes().startswith(magic)


def test_plot_of_nothing(nested):
    pytest.importorskip("matplotlib")
    result = run(ReplayConfig(nested))
    result["timeline"]["seconds"] = []
    with pytest.raises(ValueError, match="nothing to plot"):
        replayreport.plot(result, "picture.png")


def test_notes_tell_what_is_wrong_with_the_trace(call, tmp_path):
    trace = Trace()
    trace.lines.append("# entries-in-buffer/entries-written: 5/17")
    trace.enter_l2(0)
    trace.lines.append("not a line of a trace")
    trace.fault(0, GUEST)
    code, out, _ = call(trace.write(tmp_path / "trace.txt"))
    assert code == 0
    assert "note         the tracer lost 12 events" in out
    assert "note         1 line of the trace could not be read" in out
    assert "no memory slots are known" in " ".join(out.split())


def test_wrong_arguments(refused_replay, nested, capture, tmp_path):
    refused_replay("required: TRACE")
    refused_replay("invalid choice: 'l2'", nested, "--role", "l2")
    refused_replay("no policy 'none'; there are reverse-map", nested, "--teardown", "none")
    refused_replay("--teardown names no policy", nested, "--teardown", ",")
    refused_replay("size= is missing", nested, "--memslot", "gpa=0,hva=0")
    refused_replay("size must be a multiple of 4096", nested, "--memslot", "gpa=0,hva=0,size=1")
    refused_replay("must be at least 1", nested, "--vcpus", "0")
    refused_replay("contexts (1) must be at least vcpus (2)", capture, "--contexts", "1")
    refused_replay("the name must end in .png, .svg, .pdf", nested, "--plot", "picture.gif")
    refused_replay("the name must end in .html", nested, "--report", "page.txt")
    refused_replay("no folder", nested, "--report", tmp_path / "none" / "page.html")
    refused_replay("no folder", nested, "--json", tmp_path / "none" / "result.json")
    refused_replay("cannot both go to stdout", nested, "--json", "--csv")


def test_wrong_traces(refused_replay, capture, tmp_path):
    refused_replay("cannot read", tmp_path / "nothing")
    refused_replay("neither trace.txt nor tlbi.csv is there", tmp_path)
    empty, text = tmp_path / "empty", tmp_path / "text"
    empty.write_bytes(b"")
    text.write_text("hello\n" * 10)
    refused_replay("is empty", empty)
    refused_replay("is no trace", text)
    refused_replay("no capture at", text, "--memory", tmp_path)
    refused_replay("snapshots inside: 00_booting", capture / "trace.txt.xz", "--memory", capture)


def test_interrupt(capture, tmp_path):
    """A signal while the trace comes in: exit code 130 soon, the table, and a JSON that says so."""
    trace = Trace()
    trace.enter_l2(0)
    for page in range(70_000):
        trace.fault(0, GUEST + page % PAGES * PAGE)
    data = trace.write(tmp_path / "trace.txt").read_bytes()
    file = tmp_path / "result.json"
    environment = {**os.environ, "PYTHONPATH": str(Path(main.__code__.co_filename).parents[1])}
    with subprocess.Popen([sys.executable, "-m", "s2shadow", "replay", "-", "--json", str(file)], env=environment,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(data)           # more than a pipe holds: it has been read, but for the end
        process.stdin.flush()
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
    result = json.loads(file.read_text())
    assert result["interrupted"] and not result["checks"]["counts"]


def test_help_names_everything(capsys):
    with pytest.raises(SystemExit):
        main(["replay", "--help"])
    out = capsys.readouterr().out
    for option in ("--role", "--memory", "--memslot", "--teardown", "--tlbi", "--json", "--csv", "--plot", "--report"):
        assert option in out
