"""The command line: what it prints, its exit codes, and one line for everything that is wrong."""

import builtins
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import s2shadow as s2
from s2shadow import report
from s2shadow.capture import shipped
from s2shadow.cli import main

CAPTURES = Path(__file__).parent / "data" / "captures"
LINUX = CAPTURES / "b2_linux_l2_4k_7.2" / "09_final"
NESTED = CAPTURES / "g_nested_7.2" / "10_final"
STORM = ["storm", "--synthetic", "--contexts", "2", "--pages", "600", "--events", "20", "--seconds", "0.05"]


@pytest.fixture
def without(monkeypatch):
    """Make a package look as if it were not installed."""
    def hide(name):
        real = builtins.__import__

        def refuse(module, *rest):
            if module == name or module.startswith(f"{name}."):
                raise ImportError(name)
            return real(module, *rest)
        for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setattr(builtins, "__import__", refuse)
    return hide


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


def leaf():
    """IPA of a read-write page of the Linux capture whose access flag is set."""
    mem = s2.GuestMemory()
    rows = s2.leaves(mem, mem.load_tables(LINUX).vms[0].config())
    return int(rows["ipa"][(rows["perm"] == 39) & (rows["desc"] & 1 << 10 != 0)][0])


# --- general ---------------------------------------------------------------------------------------------------


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as info:
        main(["--help"])
    assert info.value.code == 0
    out = capsys.readouterr().out
    for command in ("storm", "walk", "dump", "diff", "tlbi", "sweep", "replay"):
        assert f"\n    {command} " in out


def test_no_command_prints_help(run):
    code, out, _ = run()
    assert code == 0 and out.startswith("usage: s2shadow")


def test_version(run):
    assert run("--version") == (0, f"s2shadow {s2.__version__}\n", "")


def test_module_and_exit_code():
    done = subprocess.run([sys.executable, "-m", "s2shadow", "walk", "nowhere", "0"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "s2shadow: no capture at nowhere: tables.npz is missing\n"


def test_help_does_not_load_what_it_does_not_need():
    code = "import sys; from s2shadow.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n" \
           "heavy = 'rich', 'matplotlib', 's2shadow.storm', 's2shadow.report', 's2shadow.ranges'" \
           "\nprint([m for m in heavy if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_reader_that_goes_away():
    code = "from s2shadow.cli import main; raise SystemExit(main())"
    argv = [sys.executable, "-c", code, "walk", str(LINUX), *[hex(i << 12) for i in range(5000)], "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.read(100)
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait() == 141


@pytest.mark.parametrize("argv, message", [
    (["fly"], "invalid choice: 'fly'"),
    (["storm", "--fast"], "unrecognized arguments: --fast"),
    (["walk"], "the following arguments are required: CAPTURE, IPA"),
    (["walk", str(LINUX)], "the following arguments are required: IPA"),
    (["walk", str(LINUX), "fish"], "IPA must be a number such as 0x80000000, got 'fish'"),
    (["walk", str(LINUX), "0x10000000000000000"], "IPA must be between 0 and 2^64"),
    (["walk", str(LINUX), "0", "--vm", "7"], "no VM 7; it has 0"),
    (["walk", str(LINUX), "0", "--vm", "-1"], "argument --vm: must be at least 0, got -1"),
    (["walk", str(LINUX), "0", "--access", "q"], "argument --access: must be of r, w and x, got 'q'"),
    (["walk", str(LINUX), "0", "--tables", "l1"], "no l1_tables.npz at"),
    (["walk", str(LINUX), "0", "--json", "--csv"], "--json and --csv cannot both go to stdout"),
    (["walk", "nowhere", "0"], "no capture at nowhere: tables.npz is missing"),
    (["storm", "--capture", "nowhere"], "no capture at nowhere: tables.npz is missing"),
    (["storm", "--capture", "x", "--synthetic"], "--capture and --synthetic exclude each other"),
    (["storm", "--vm", "1", "--synthetic"], "--vm and --synthetic exclude each other"),
    (["storm", "--pages", "5"], "--pages needs --synthetic"),
    (["storm", "--aliases", "5"], "--aliases needs --synthetic"),
    (["storm", "--block-mix", "0.5"], "--block-mix needs --synthetic"),
    (["storm", "--synthetic", "--pages", "0"], "argument --pages: must be at least 1, got 0"),
    (["storm", "--synthetic", "--pages", "many"], "argument --pages: must be a whole number, got 'many'"),
    (["storm", "--synthetic", "--contexts", "-3"], "argument --contexts: must be at least 1, got -3"),
    (["storm", "--synthetic", "--aliases", "0"], "argument --aliases: must be at least 1, got 0"),
    (["storm", "--synthetic", "--block-mix", "1.5"], "argument --block-mix: must be between 0 and 1, got 1.5"),
    (["storm", "--synthetic", "--block-mix", "nan"], "argument --block-mix: must be between 0 and 1, got nan"),
    (["storm", "--events", "0"], "argument --events: must be at least 1, got 0"),
    (["storm", "--events", "1.5"], "argument --events: must be a whole number, got '1.5'"),
    (["storm", "--event-pages", "0"], "argument --event-pages: must be at least 1, got 0"),
    (["storm", "--event-pages", "99999999"], "event_pages 99,999,999 is more than the"),
    (["storm", "--synthetic", "--pages", "10", "--contexts", "2", "--event-pages", "21"],
     "event_pages 21 is more than the 20 canonical pages of the set"),
    (["storm", "--synthetic", "--pages", "999999999"], "exceed the 40-bit IPA space"),
    (["storm", "--synthetic", "--contexts", "65536"], "contexts must be at most 65534 with 16-bit VMIDs, got 65536"),
    (["storm", "--synthetic", "--contexts", "60000", "--pages", "1000000"], "GiB, this machine has"),
    (["storm", "--teardown", "prayer"],
     "no policy 'prayer'; there are reverse-map, interval-map, blow-away, blow-away-lean"),
    (["storm", "--teardown", ","], "--teardown names no policy"),
    (["storm", "--tlbi", "loose"], "argument --tlbi: invalid choice: 'loose'"),
    (["storm", "--seed", "-1"], "argument --seed: must be at least 0, got -1"),
    (["storm", "--seconds", "0"], "argument --seconds: must be a positive number of seconds, got 0"),
    (["storm", "--json", "no/such/folder/out.json"], "cannot write no/such/folder/out.json: no folder no/such/folder"),
    (["storm", "--csv", "/"], "cannot write /: it is a folder"),
    (["storm", "--plot", "out.gif"], "cannot plot to out.gif: the name must end in .png, .svg, .pdf"),
    (["storm", "--plot", "-"], "cannot plot to -: the name must end in .png, .svg, .pdf"),
    (["storm", "--plot", "no/such/out.png"], "cannot write no/such/out.png: no folder no/such"),
    (["storm", "--json", "--csv", "-"], "--json and --csv cannot both go to stdout"),
    (["storm", "--json", ""], "--json needs a file name"),
], ids=lambda value: " ".join(value)[-40:].replace("/", "_") if isinstance(value, list) else "")
def test_usage_errors(refused, argv, message):
    refused(message, *argv)


def test_damaged_capture(refused, tmp_path):
    (tmp_path / "tables.npz").write_bytes(b"not a zip")
    (tmp_path / "registers.json").write_text((LINUX / "registers.json").read_text())
    refused(f"{tmp_path}/tables.npz is damaged", "storm", "--capture", tmp_path)
    refused(f"{tmp_path}/tables.npz is damaged", "walk", tmp_path, "0")


def test_plot_without_matplotlib_is_refused_before_the_run(refused, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("s2shadow.storm.run", lambda *_: pytest.fail("it ran"))
    refused("pip install 's2shadow[plot]'", *STORM, "--plot", tmp_path / "out.png")


def test_outputs_are_checked_before_the_run(refused, monkeypatch, tmp_path):
    monkeypatch.setattr("s2shadow.storm.run", lambda *_: pytest.fail("it ran"))
    refused("cannot write", *STORM, "--json", tmp_path)
    refused("cannot write", *STORM, "--json", tmp_path / "x" / "y.json")
    assert list(tmp_path.iterdir()) == []


# --- walk ------------------------------------------------------------------------------------------------------


def test_walk_in_one_line(run):
    ipa = leaf()
    code, out, err = run("walk", LINUX, hex(ipa + 0x123))
    assert (code, err) == (0, "")
    assert out.startswith(f"{ipa + 0x123:#x} → 0x") and out.endswith("4K page, readable, writable, executable\n")


def test_walk_explained(run):
    mem = s2.GuestMemory()
    cfg = mem.load_tables(LINUX).vms[0].config()
    ipa = leaf()
    found = s2.walk(mem, cfg, ipa, update=False)
    code, out, _ = run("walk", LINUX, hex(ipa), "--explain")
    head, *levels, last = out.splitlines()
    assert code == 0
    assert head == ("VMID 1  VTTBR 0x000100010502e001  VTCR 0x802d3558: 4K granule, 40-bit IPA, "
                    "starts at level 1 (2 tables side by side), HA on")
    assert [line[:2] for line in levels] == ["L1", "L2", "L3"]
    assert levels[0].startswith("L1  0x10502e000[") and "   table   → 0x" in levels[0]
    assert f"{found.desc:#018x}   page    → {found.pa:#x}   read-write, execute, AF" in levels[2]
    assert levels[2].endswith("Normal write-back, inner shareable")
    assert last.startswith(f"{ipa:#x} → {found.pa:#x}   4K page")


def test_walk_never_writes_and_says_what_hardware_would(run):
    """46 % of this capture's leaves have AF clear; a walk shows that and leaves the memory as it was."""
    mem = s2.GuestMemory()
    rows = s2.leaves(mem, mem.load_tables(LINUX).vms[0].config())
    old = int(rows["ipa"][rows["desc"] & 1 << 10 == 0][0])
    code, out, _ = run("walk", LINUX, hex(old), "--explain")
    assert code == 0 and "AF clear (hardware sets it)" in out
    code, out, _ = run("walk", LINUX, hex(old), "--json")
    assert json.loads(out)["walks"][0]["updated"] == 1


def test_walk_faults_and_exit_code(run):
    ipa = leaf()
    code, out, _ = run("walk", LINUX, "0x10000000000", "0", hex(ipa), "--explain")
    lines = out.splitlines()
    assert code == 1
    assert lines[1] == "0x10000000000 is beyond the 40-bit input"
    assert lines[2] == "0x10000000000   translation fault, level 0 (FSC 0x04)"
    assert "   invalid" in out and "0x0   translation fault, level " in out
    assert run("walk", LINUX, hex(ipa))[0] == 0


def test_walk_permission_fault(run):
    """The nested capture has read-only leaves: a write is told what the leaf allows."""
    mem = s2.GuestMemory()
    vm = mem.load_tables(CAPTURES / "g_nested_7.2" / "02_dirtylog_on").vms[0]
    rows = s2.leaves(mem, vm.config())
    ipa = int(rows["ipa"][rows["perm"] & 3 == 1][0])
    code, out, _ = run("walk", CAPTURES / "g_nested_7.2" / "02_dirtylog_on", hex(ipa), "--access", "w", "--explain")
    assert code == 1
    assert "read-only" in out
    assert out.endswith("permission fault, level 3 (FSC 0x0f); the leaf allows r-x\n")


def test_walk_json(run):
    ipa = leaf()
    code, out, _ = run("walk", LINUX, hex(ipa), "0", "--json", "--explain")
    data = json.loads(out)
    assert code == 1 and data["vmid"] == 1 and data["vttbr"] == "0x100010502e001"
    good, bad = data["walks"]
    assert good["fault"] is None and bad["fault"].startswith("translation fault")
    assert [step["level"] for step in good["levels"]] == [1, 2, 3]
    assert good["levels"][-1]["address"] == good["desc_addr"]


def test_walk_csv_to_file(run, tmp_path):
    ipa = leaf()
    code, out, _ = run("walk", LINUX, hex(ipa), "--csv", tmp_path / "walks.csv")
    (row,) = csv.DictReader(io.StringIO((tmp_path / "walks.csv").read_text()))
    assert code == 0 and out and row["ipa"] == hex(ipa) and row["size"] == "4096"


def test_walk_tables_of_nested_captures(run):
    own = json.loads(run("walk", NESTED, "0", "--json")[1])
    host = json.loads(run("walk", NESTED, "0", "--json", "--tables", "host")[1])
    assert own["vttbr"] != host["vttbr"] and (own["ipa_bits"], host["ipa_bits"]) == (36, 48)


@pytest.mark.parametrize("snapshot", [LINUX, NESTED, CAPTURES / "c_storm_lpa2_7.2" / "10_final",
                                      CAPTURES / "a_storm_max_7.2" / "10_final"], ids=lambda p: p.parent.name)
def test_explain_ends_where_walk_ended(snapshot):
    """Traced and untraced, a walk is the same; its last level is the descriptor that it read, decoded on its own."""
    mem = s2.GuestMemory()
    rng = np.random.default_rng(3)
    for vm in mem.load_tables(snapshot).vms:
        cfg = vm.config()
        mapped = s2.leaves(mem, cfg)["ipa"]
        wild = rng.integers(0, 1 << cfg.ia_bits, 50, dtype=np.uint64)
        for ipa in [*rng.choice(mapped, 50).tolist(), *wild.tolist()]:
            found = s2.walk(mem, cfg, ipa, update=False)
            traced = s2.walk(mem, cfg, ipa, update=False, trace=True)
            assert repr(traced) == repr(found) and found.steps == () == found.notes
            last = traced.steps[-1]
            assert (last.address, last.desc) == (found.desc_addr, found.desc)
            assert last.level == found.level
            if not found.status:
                assert last.output == found.pa & -found.size


def test_explain_unreadable_and_illegal():
    """Tables outside memory and illegal registers are shown as such, not as a traceback."""
    mem = s2.GuestMemory()
    mem.add(0x1000_0000, 0x2000)
    mem.write64(0x1000_0000, 0x7000_0003)
    cfg = s2.Stage2Config(0x1000_0000, 0x802D3558)
    lines = [line.text for line in report.explain_lines(cfg, s2.walk(mem, cfg, 0, update=False, trace=True))]
    assert lines[1] == "L2  0x70000000[  0] = no RAM there"
    assert lines[2].startswith("0x0   external abort on table walk, level 2")
    cfg = s2.Stage2Config(0x1000_0000, 0x80000000)
    lines = [line.text for line in report.explain_lines(cfg, s2.walk(mem, cfg, 0, update=False, trace=True))]
    assert lines == ["0x0   translation fault, level 0 (FSC 0x04)"]
    assert report.config_line(cfg).endswith("every walk ends in a translation fault, level 0")


@pytest.mark.parametrize("memattr, fwb, text", [
    (0b0001, False, "Device-nGnRE"), (0b1111, False, "Normal write-back"), (0b0101, False, "Normal non-cacheable"),
    (0b1101, False, "Normal outer write-back, inner non-cacheable"), (0b0110, True, "Normal write-back"),
    (0b0111, True, "as stage 1 says"), (0b0010, True, "Device-nGRE"),
])
def test_memory_attributes_in_words(memattr, fwb, text):
    assert report.memattr_text(memattr, fwb) == text


# --- storm -----------------------------------------------------------------------------------------------------


def test_storm_table(run):
    code, out, err = run(*STORM)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "L1 tables    generated (600 pages per context), 2 contexts"
    assert lines[1] == "storm        1 page per event, random, working set touched again after each event"
    assert lines[3].split() == ["policy", "events", "teardown/event", "p50", "p99", "refaults/event", "total/event",
                                "removed/required"]
    rows = {line.split()[0]: line.split() for line in lines[4:7]}
    assert list(rows) == ["reverse-map", "blow-away", "blow-away-lean"]
    assert rows["reverse-map"][1] == "20" and rows["reverse-map"][-1] == "1.00"
    assert rows["blow-away"][-1] == "1,200"
    assert lines[8].startswith("faults       ") and " each; one dependent load over the same " in lines[8]
    assert " B reverse map per 4K mapping" in lines[9]
    assert "JSON: --json FILE" in lines[10]
    assert "\x1b" not in out


def test_storm_json_and_csv(run, tmp_path):
    code, out, err = run(*STORM, "--json", "-", "--csv", tmp_path / "out.csv")
    assert (code, err) == (0, "")
    data = json.loads(out)
    rows = {row["policy"]: row for row in csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text()))}
    assert list(rows) == list(data["policies"])
    for name, policy in data["policies"].items():
        assert int(rows[name]["events"]) == policy["events"]
        assert float(rows[name]["teardown_ns_per_event_p50"]) == policy["teardown_ns_per_event"]["p50"]


def test_storm_json_to_file_is_whole(run, tmp_path):
    file = tmp_path / "out.json"
    file.write_text("old")
    file.chmod(0o640)
    code, out, _ = run(*STORM, "--teardown", "reverse-map,blow-away-lean", "--json", file)
    assert code == 0 and out.startswith("L1 tables")
    assert list(json.loads(file.read_text())["policies"]) == ["reverse-map", "blow-away-lean"]
    assert file.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_policies_by_repetition_and_list(run):
    code, out, _ = run(*STORM, "--teardown", "blow-away-lean", "--teardown", "blow-away-lean,reverse-map", "--json")
    assert code == 0 and list(json.loads(out)["policies"]) == ["blow-away-lean", "reverse-map"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_stdout_is_one_line():
    for option in ("--json", "--explain"):
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, "-m", "s2shadow", "walk", str(LINUX), "0", option], stdout=full,
                                  stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (2, "s2shadow: cannot write stdout: no space left on device\n")


def test_failed_write_leaves_the_old_file(monkeypatch, tmp_path):
    file = tmp_path / "out.json"
    file.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        report.write_json({}, file)
    assert file.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_link_stays_a_link(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    report.write_json({"a": 1}, tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "real.json").read_text()) == {"a": 1}


@pytest.mark.parametrize("suffix, magic", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_storm_plot(run, tmp_path, suffix, magic):
    pytest.importorskip("matplotlib")
    code, _, err = run(*STORM, "--plot", tmp_path / f"out.{suffix}")
    assert (code, err) == (0, "")
    assert (tmp_path / f"out.{suffix}").read_bytes().startswith(magic)


def test_ctrl_c_shows_what_there_is(run, monkeypatch):
    from s2shadow import storm

    real = storm.Rig.round
    calls = []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) > 7:
            raise KeyboardInterrupt
        return real(self, *args)
    monkeypatch.setattr(storm.Rig, "round", interrupted)
    code, out, _ = run(*STORM)
    assert code == 130
    assert "reverse-map" in out and "Interrupted: the figures are of the rounds until then." in out


def test_ctrl_c_for_real(tmp_path):
    """A signal in the middle of a long run: exit code 130, the table, and a JSON that says so."""
    code = ("import signal, threading, time, os\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from s2shadow import storm\n"
            "from s2shadow.cli import main\n"
            "real = storm.Rig.round\n"
            "def first(self, *args):\n"
            "    storm.Rig.round = real\n"
            "    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
            "    return real(self, *args)\n"
            "storm.Rig.round = first\n"
            "raise SystemExit(main())")
    argv = [*STORM, "--teardown", "blow-away", "--events", "1000000", "--seconds", "60",
            "--json", tmp_path / "out.json"]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (130, "")
    assert "Interrupted: the figures are of the rounds until then." in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["interrupted"] is True


def test_ctrl_c_before_anything(run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr("s2shadow.storm.build", interrupted)
    code, out, _ = run(*STORM)
    assert code == 130 and out == "Interrupted before the first round was complete.\n"


def test_out_of_memory_is_one_line(refused, monkeypatch):
    def fail(*_):
        raise MemoryError("the engine's tables")
    monkeypatch.setattr("s2shadow.storm.build", fail)
    refused("out of memory: the engine's tables", *STORM)


# --- terminals -------------------------------------------------------------------------------------------------

LINES = [report.Line("policy   total", "bold"), report.Line("a → b   1.3 µs", "green")]


def test_colour_only_on_a_terminal(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    plain, terminal = io.StringIO(), Terminal()
    report.emit(LINES, plain)
    report.emit(LINES, terminal)
    assert "\x1b" not in plain.getvalue() and "\x1b[1m" in terminal.getvalue()
    assert "a → b   1.3 µs" in terminal.getvalue()


def test_no_color(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    report.emit(LINES, terminal)
    assert terminal.getvalue() == "policy   total\na → b   1.3 µs\n"


def test_without_rich(without, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    without("rich")
    terminal = Terminal()
    report.emit(LINES, terminal)
    assert terminal.getvalue() == "policy   total\na → b   1.3 µs\n"


def test_long_lines_are_never_cut(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    report.emit([report.Line("x" * 200)], terminal)
    assert "x" * 200 in terminal.getvalue()


def test_ascii_terminals():
    class Old(io.StringIO):
        encoding = "ascii"
    stream = Old()
    report.emit(LINES, stream)
    assert stream.getvalue() == "policy   total\na -> b   1.3 us\n"


@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
def test_progress_on_a_terminal(without, monkeypatch, rich):
    from s2shadow.commands.common import progress_bar

    if rich:
        pytest.importorskip("rich")
    else:
        without("rich")
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    with progress_bar(stream) as progress:
        progress("reverse-map", 0.5)
        progress("reverse-map", 1.0)
    assert "reverse-map" in stream.getvalue() and "100%" in stream.getvalue()


def test_no_progress_elsewhere():
    from s2shadow.commands.common import progress_bar

    with progress_bar(io.StringIO()) as progress:
        assert progress is None


# --- numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ns, text", [
    (None, "-"), (0, "0 ns"), (9.4, "9 ns"), (410, "410 ns"), (999.4, "999 ns"), (999.6, "1.0 µs"), (1300, "1.3 µs"),
    (9940, "9.9 µs"), (9960, "10 µs"), (39e6, "39 ms"), (1.9e6, "1.9 ms"), (999.7e6, "1.0 s"), (12e9, "12 s"),
    (5000e9, "5,000 s"),
])
def test_time_text(ns, text):
    assert report.time_text(ns) == text


@pytest.mark.parametrize("value, text", [(None, "-"), (4, "4"), (4.6, "4.6"), (257640, "257,640"), (0.25, "0.25")])
def test_count_text(value, text):
    assert report.count_text(value) == text


@pytest.mark.parametrize("value, text", [(1.26, "1.3"), (12.7, "13"), (134.4, "130"), (13449, "13,000")])
def test_times_text(value, text):
    assert report.times_text(value) == text


@pytest.mark.parametrize("value, text", [(512, "512 B"), (2048, "2.0 KiB"), (21 << 20, "21 MiB"), (3 << 30, "3.0 GiB")])
def test_bytes_text(value, text):
    assert report.bytes_text(value) == text


def test_shipped_capture_is_the_default(run):
    code, out, _ = run("storm", "--contexts", "1", "--events", "3", "--teardown", "reverse-map")
    assert code == 0
    assert out.splitlines()[0] == \
        "L1 tables    Linux 7.2.13 hosting a Linux guest (64,410 leaves of 4K, captured), 1 context"
    assert shipped().is_dir()
