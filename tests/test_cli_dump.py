"""``s2shadow dump`` and ``s2shadow diff``: what they print, exit codes, and one line for everything that is wrong."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import s2shadow as s2
import snapshots
from s2shadow import dump

CAPTURES = snapshots.CAPTURES
LINUX = CAPTURES / "b2_linux_l2_4k_7.2" / "04_balloon_back"
STORM = CAPTURES / "a_storm_max_7.2" / "10_final"
NESTED = CAPTURES / "g_nested_7.2" / "10_final"
SHADOW_FILE = "0x0001000044196000-0x00000000802d355c-s2-enabled"


@pytest.fixture
def stdin(monkeypatch):
    def feed(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    return feed


def rows_of(path, which="auto", vm=0):
    mem = s2.GuestMemory()
    return dump.ranges(mem, mem.load_tables(path, which=which).vms[vm].config())


@pytest.fixture
def text(tmp_path):
    """A kernel dump of the Linux capture in a file."""
    (tmp_path / "kernel.txt").write_text(dump.kernel_text(rows_of(LINUX)))
    return tmp_path / "kernel.txt"


# --- dump --------------------------------------------------------------------------------------------------------


def test_kernel_format(run):
    assert run("dump", LINUX, "--format", "kernel") == (0, dump.kernel_text(rows_of(LINUX)), "")


def test_kernel_format_beside_json(run, tmp_path):
    code, out, _ = run("dump", LINUX, "--format", "kernel", "--json", tmp_path / "out.json")
    assert code == 0 and out == dump.kernel_text(dump.from_records(
        json.loads((tmp_path / "out.json").read_text())["ranges"]))


def test_reader_that_goes_away():
    """The text is more than a pipe and the reader's buffer hold: it cannot all be written before the reader is gone."""
    argv = [sys.executable, "-m", "s2shadow", "dump", str(STORM), "--format", "kernel"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.read(100)
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait() == 141


def test_kernel_format_of_a_process():
    """As bytes through a pipe."""
    argv = [sys.executable, "-m", "s2shadow", "dump", str(LINUX), "--format", "kernel"]
    done = subprocess.run(argv, capture_output=True, check=True)
    assert done.stdout.decode("ascii") == dump.kernel_text(rows_of(LINUX)) and done.stderr == b""


@pytest.mark.parametrize("how", [["--json"], ["--format", "json"], ["--json", "FILE"]])
def test_json(run, tmp_path, how):
    code, out, _ = run("dump", LINUX, *[tmp_path / "out.json" if word == "FILE" else word for word in how])
    data = json.loads((tmp_path / "out.json").read_text() if "FILE" in how else out)
    assert code == 0 and (data["schema"], data["ipa_bits"], data["granule"], data["table"]) == (1, 40, 4096, "VM 0")
    assert dump.from_records(data["ranges"]).tolist() == rows_of(LINUX).tolist()


def test_csv(run):
    _, out, _ = run("dump", LINUX, "--csv")
    found = list(csv.DictReader(io.StringIO(out)))
    rows = rows_of(LINUX)
    assert [int(row["start"], 16) for row in found] == rows["start"].tolist()
    assert [row["perm"] for row in found if row["state"] == "mapped"][:1] == ["rwx"]


def test_table_has_everything(run):
    """One line per range, with addresses in full; the last range too."""
    rows = rows_of(LINUX)
    code, out, err = run("dump", LINUX)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{LINUX}: VM 0" and lines[1].startswith("VMID 1  VTTBR 0x0001") and "40-bit IPA" in lines[1]
    body = [line for line in lines if line.startswith("0x")]
    assert [line[:37] for line in body] == [f"0x{a:016x}-0x{b:016x}" for a, b in rows[["start", "end"]].tolist()]
    assert body[-1].split()[-2:] == ["not", "mapped"]
    mapped = rows[rows["state"] == dump.State.MAPPED]
    line = next(line for line in body if line.startswith(f"0x{int(mapped['start'][-1]):016x}"))
    assert f" {int(mapped['pa'][-1]):#x} " in line and " rwx " in line
    leaves = snapshots.load("b2_linux_l2_4k_7.2/04_balloon_back").registers["vms"][0]["leaves"]
    assert leaves == {"4K": 64410}
    assert lines[-1] == f"252 MiB mapped in {len(mapped):,} ranges; leaves: 64,410 of 4K"


def test_vm_choice(run):
    texts = {vm: run("dump", STORM, "--vm", vm, "--format", "kernel")[1] for vm in (0, 1, 2)}
    assert len(set(texts.values())) == 3
    for vm, text in texts.items():
        assert text == dump.kernel_text(rows_of(STORM, vm=vm))
    assert run("dump", STORM, "--format", "kernel")[1] == texts[0]


def test_nested_choices(run):
    """L1's table, the host's, the shadow; the same by --vm among the host's tables."""
    snap = snapshots.load("g_nested_7.2/10_final")
    kernel = [run("dump", NESTED, *choice, "--format", "kernel")[1]
              for choice in ([], ["--host"], ["--nested", "0"], ["--tables", "host", "--vm", "1"])]
    assert kernel[2] == kernel[3] and len(set(kernel)) == 3
    host = snap.registers["l0_table_for_l1"]
    for text, leaves in ((kernel[0], 7386), (kernel[1], host["leaves"]), (kernel[2], 4852)):
        rows = dump.parse_kernel_text(text)
        rows = rows[rows["state"] == dump.State.MAPPED]
        sizes = np.array([1 << 39, 1 << 30, 1 << 21, 1 << 12])[rows["level"]]
        assert ((rows["end"] - rows["start"]).astype(int) // sizes).sum() == leaves
    out = run("dump", NESTED, "--host")[1]
    assert out.startswith(f"{NESTED}: host table for L1\n") and "Normal write-back" in out


def test_engine_dump(run):
    """What the engine builds holds what the real host's shadow holds."""
    rows = dump.from_records(json.loads(run("dump", NESTED, "--engine", "--json")[1])["ranges"])
    shadow = rows_of(NESTED, "host")
    assert set(dump.diff(rows, shadow)["kind"]) == {dump.Difference.MISSING}
    assert run("dump", NESTED, "--engine", "--nested", "0", "--format", "kernel")[1] == dump.kernel_text(rows)


def test_output_folder(run, tmp_path):
    """The VM's debugfs folder as Linux has it, whole."""
    code, out, _ = run("dump", NESTED, "-o", tmp_path / "vm")
    names = ["stage2_page_tables", "ipa_range", "stage2_levels", f"nested/{SHADOW_FILE}"]
    assert code == 0 and out == "".join(f"{tmp_path}/vm/{name}\n" for name in names)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(
        f"vm/{name}" for name in names)
    read = {name: (tmp_path / "vm" / name).read_text() for name in names}
    assert read["stage2_page_tables"] == run("dump", NESTED, "--host", "--format", "kernel")[1]
    assert read[names[3]] == run("dump", NESTED, "--nested", "0", "--format", "kernel")[1]
    assert (read["ipa_range"], read["stage2_levels"]) == ("40\n", "3\n")
    assert run("diff", NESTED, tmp_path / "vm", "--host")[0] == 0


def test_output_folder_of_a_plain_capture(run, tmp_path):
    (tmp_path / "vm").mkdir()       # an empty folder may be there
    assert run("dump", STORM, "--vm", "1", "-o", tmp_path / "vm")[0] == 0
    assert (tmp_path / "vm" / "stage2_page_tables").read_text() == dump.kernel_text(rows_of(STORM, vm=1))
    assert not (tmp_path / "vm" / "nested").exists() and (tmp_path / "vm" / "ipa_range").read_text() == "36\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "vm"]


def test_output_folder_whole_or_not_at_all(run, refused, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    refused("it exists and is not an empty folder", "dump", NESTED, "-o", tmp_path / "full")
    refused("it exists and is not an empty folder", "dump", NESTED, "-o", tmp_path / "full" / "mine")
    refused("no folder", "dump", NESTED, "-o", tmp_path / "no" / "vm")
    real, calls = Path.write_text, []

    def disk_full(self, *args, **keywords):
        calls.append(self)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(self, *args, **keywords)
    monkeypatch.setattr(Path, "write_text", disk_full)
    refused("no space left on device", "dump", NESTED, "-o", tmp_path / "vm")
    assert len(calls) == 3 and list(tmp_path.iterdir()) == [tmp_path / "full"]


def test_dump_writes_nothing_to_the_capture(run):
    before = {path: path.stat().st_mtime_ns for path in NESTED.iterdir()}
    run("dump", NESTED, "--engine")
    assert {path: path.stat().st_mtime_ns for path in NESTED.iterdir()} == before


# --- diff --------------------------------------------------------------------------------------------------------


def test_the_same(run, text, tmp_path):
    """A capture, its kernel text and its JSON say the same, however they are paired."""
    run("dump", LINUX, "--json", tmp_path / "dump.json")
    for a in (LINUX, text, tmp_path / "dump.json"):
        for b in (LINUX, text, tmp_path / "dump.json"):
            code, out, err = run("diff", a, b)
            assert (code, err) == (0, "") and out.splitlines()[-1] == "no difference"


@pytest.mark.parametrize("kind", ["kernel", "json"])
def test_stdin(run, stdin, kind):
    data = run("dump", LINUX, "--format", kind)[1].encode()
    stdin(data)
    code, out, _ = run("diff", LINUX, "-")
    assert code == 0 and "B   stdin: " in out
    stdin(data)
    assert run("diff", "-", CAPTURES / "b2_linux_l2_4k_7.2" / "09_final")[0] == 1


def test_pipe_between_two():
    """dump | diff -, as one types it."""
    first = subprocess.run([sys.executable, "-m", "s2shadow", "dump", str(LINUX), "--format", "kernel"],
                           capture_output=True, check=True)
    done = subprocess.run([sys.executable, "-m", "s2shadow", "diff", "-", str(LINUX)], input=first.stdout,
                          capture_output=True)
    assert done.returncode == 0 and done.stdout.endswith(b"no difference\n")


def altered(folder, tmp_path, change, name="tables.npz"):
    """A copy of a capture in which ``change`` edits {address: words}."""
    copy = tmp_path / "altered"
    shutil.copytree(folder, copy)
    with np.load(folder / name) as file:
        addresses, pages = file["addresses"], file["pages"].copy()
    words = pages.view("<u8")
    change({address: words[i] for i, address in enumerate(addresses.tolist())})
    np.savez(copy / name, addresses=addresses, pages=pages)
    return copy


def set_leaf(ipa, vttbr, vtcr, change):
    """Edit the descriptor of one page below a root."""
    def edit(tables):
        cfg = s2.Stage2Config(vttbr, vtcr)
        table, level, index = cfg.baddr, cfg.start_level, None
        while True:
            index = ipa >> 39 - 9 * level & (0xFFFF if level == cfg.start_level else 511)
            page = tables[(table + 8 * index) & -4096]
            desc = int(page[index % 512])
            if level == 3 or desc & 3 != 3:
                break
            table, level = desc & 0xFFFF_FFFF_F000, level + 1
        assert level == 3
        page[index % 512] = change(desc)
    return edit


def a_shadow_page():
    """IPA of a read-write page in the real host's shadow, and its output address."""
    rows = rows_of(NESTED, "host")
    row = rows[(rows["level"] == 3) & (rows["perm"] == 39)][5]
    return int(row["start"]), int(row["pa"])


SHADOW = 0x300010FD20001, 0x802D3590
IPA, PA = a_shadow_page()
EMPTY = next(int(row["end"]) - 4096 for row in rows_of(NESTED, "host")
             if row["level"] == 3 and row["state"] == dump.State.INVALID)


@pytest.mark.parametrize("ipa, change, kind, a, b", [
    (IPA, lambda desc: desc & ~0x80, "permission", "4K rwx", "4K r-x"),
    (IPA, lambda desc: desc ^ 0x1000, "address", f"4K rwx → {PA:#x}", f"4K rwx → {PA ^ 0x1000:#x}"),
    (EMPTY, lambda desc: 0x4000_0000 | 0x7FF, "extra", "not mapped", "4K rwx"),
    (IPA, lambda desc: desc & ~0x3C, "attributes", "4K rwx memattr 0x6 sh 3", "4K rwx memattr 0x0 sh 3"),
], ids=["permission", "address", "stale", "attributes"])
def test_engine_finds_what_is_wrong_in_a_shadow(run, tmp_path, ipa, change, kind, a, b):
    """A real shadow with one entry altered: exactly that page, exit code 1."""
    copy = altered(NESTED, tmp_path, set_leaf(ipa, *SHADOW, change))
    code, out, _ = run("diff", NESTED, copy, "--nested", "0", "--engine")
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith("0x")]
    assert line.split("   ")[0] == f"0x{ipa:016x}-0x{ipa + 4096:016x}"
    assert [cell.strip() for cell in line.split("   ") if cell.strip()][1:] == ["4K", kind, a, b]
    assert out.splitlines()[-1] == f"different in 1 range: {kind} 1 range (4.0 KiB)"
    data = json.loads(run("diff", copy, "--engine", "--json")[1])
    assert data["counts"] == {kind: {"ranges": 1, "bytes": 4096}} and not data["same"]
    assert data["differences"][0]["start"] == f"{ipa:#x}" and data["differences"][0]["kind"] == kind


@pytest.mark.parametrize("path", sorted(p.parent for p in CAPTURES.glob("g*/*/l1_tables.npz")),
                         ids=lambda path: f"{path.parent.name[:2]}-{path.name}")
def test_real_shadows_are_what_the_engine_builds(run, path, tmp_path):
    """Every nested snapshot, as table and as kernel text: nothing but entries that the host has not filled yet."""
    code, out, _ = run("diff", path, "--engine")
    assert code == 0 and out.splitlines()[-1] == "no difference"
    run("dump", path, "-o", tmp_path / "vm")
    (file,) = (tmp_path / "vm" / "nested").iterdir()
    assert run("diff", path, file, "--engine")[0] == 0


def test_strict_counts_what_is_not_filled(run):
    code, out, _ = run("diff", NESTED, "--engine")
    assert code == 0 and "not mapped in B (yet), which is no difference: 9.9 MiB in 501 ranges" in out
    code, out, _ = run("diff", NESTED, "--engine", "--strict", "--limit", "3")
    assert code == 1 and "different in 501 ranges: missing 501 ranges (9.9 MiB)" in out
    assert sum(line.startswith("0x") for line in out.splitlines()) == 3
    assert "… and 498 ranges more (--limit 0 shows all)" in out


def test_limit(run):
    later = CAPTURES / "b2_linux_l2_4k_7.2" / "09_final"
    found = dump.diff(rows_of(LINUX), rows_of(later))
    shown = [sum(line.startswith("0x") for line in run("diff", LINUX, later, *limit)[1].splitlines())
             for limit in ([], ["--limit", "7"], ["--limit", "0"])]
    assert shown == [20, 7, len(found)]
    data = json.loads(run("diff", LINUX, later, "--json", "--limit", "7")[1])
    assert len(data["differences"]) == len(found) > 1000
    for what, count in data["counts"].items():
        rows = found[found["kind"] & dump.Difference[what.upper().replace(" ", "_")] != 0]
        assert count == {"ranges": len(rows), "bytes": sum((rows["end"] - rows["start"]).tolist())}
    out = run("diff", LINUX, later, "--csv")[1]
    assert len(list(csv.DictReader(io.StringIO(out)))) == len(found)


def test_csv_without_differences(run):
    assert run("diff", LINUX, LINUX, "--csv")[1].count("\n") == 1


def test_access_flag(run, tmp_path):
    copy = altered(NESTED, tmp_path, set_leaf(IPA, *SHADOW, lambda desc: desc & ~0x400))
    assert run("diff", NESTED, copy, "--nested", "0")[0] == 0
    code, out, _ = run("diff", NESTED, copy, "--nested", "0", "--access-flag")
    assert code == 1 and "access flag" in out and "4K rwx AF " in out and "4K rwx no AF" in out


def test_cut_between_lines_is_noted(run, text):
    lines = text.read_text().splitlines(keepends=True)
    text.write_text("".join(lines[:40]))
    code, out, _ = run("diff", LINUX, text)
    assert code == 1 and "inside a table: it may have been cut short" in out


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, message", [
    (["dump"], "the following arguments are required: CAPTURE"),
    (["dump", "nowhere"], "no capture at nowhere: tables.npz is missing"),
    (["dump", LINUX, "--vm", "7"], "no VM 7; it has 0"),
    (["dump", LINUX, "--format", "dot"], "argument --format: invalid choice: 'dot'"),
    (["dump", LINUX, "--host"], "has no host table: no guest hypervisor ran in this capture"),
    (["dump", LINUX, "--nested", "0"], "has no shadow tables: no guest hypervisor ran in this capture"),
    (["dump", LINUX, "--engine"], "no l1_tables.npz at"),
    (["dump", LINUX, "--engine", "-o", "x"], "--engine needs a nested capture, and no guest hypervisor ran in"),
    (["dump", NESTED, "--nested", "1"], "has no shadow 1; it has 1, counted from 0"),
    (["dump", NESTED, "--engine", "--nested", "1"], "has no shadow 1; it has 1, counted from 0"),
    (["dump", NESTED, "--nested", "-1"], "argument --nested: must be at least 0, got -1"),
    (["dump", NESTED, "--host", "--nested", "0"], "--host and --nested exclude each other"),
    (["dump", NESTED, "--host", "--engine"], "--host and --engine exclude each other"),
    (["dump", NESTED, "--host", "--vm", "0"], "--vm goes with the tables of VMs"),
    (["dump", NESTED, "--engine", "--tables", "l1"], "--tables goes with the tables of VMs"),
    (["dump", NESTED, "-o", "x", "--format", "table"], "-o writes the kernel's files; other formats do not go with it"),
    (["dump", NESTED, "-o", "x", "--csv"], "-o writes the kernel's files; other formats do not go with it"),
    (["dump", NESTED, "-o", "x", "--host"], "-o writes every table; --host does not go with it"),
    (["dump", NESTED, "-o", "x", "--vm", "1"], "-o writes every table of a nested capture; --vm does not go with it"),
    (["dump", LINUX, "--format", "json", "--csv"], "--json and --csv cannot both go to stdout"),
    (["dump", LINUX, "--format", "kernel", "--json"], "--format kernel and --json cannot both go to stdout"),
    (["dump", LINUX, "--format", "kernel", "--csv", "-"], "--format kernel and --csv cannot both go to stdout"),
    (["dump", LINUX, "--json", "no/such/out.json"], "cannot write no/such/out.json: no folder no/such"),
    (["diff"], "the following arguments are required: A"),
    (["diff", LINUX], "the following arguments are required: B"),
    (["diff", "-", "-"], "only one of A and B can be stdin"),
    (["diff", "nowhere", LINUX], "cannot read nowhere: no such file or directory"),
    (["diff", LINUX, CAPTURES], "no capture at"),
    (["diff", __file__, LINUX], "line 1: must be '---[ Guest IPA ]---'"),
    (["diff", LINUX, LINUX / "tables.npz"], "line 1: must be '---[ Guest IPA ]---'"),
    (["diff", LINUX, LINUX / "registers.json"], "is no dump: it has no ranges"),
    (["diff", LINUX, LINUX, "--strict"], "--strict goes with --engine"),
    (["diff", LINUX, "--engine"], "no l1_tables.npz at"),
    (["diff", __file__, "--engine"], "--engine needs a nested capture as A"),
    (["diff", __file__, __file__, "--host"], "--host needs a capture, and neither"),
    (["diff", "-", __file__, "--vm", "1"], "--vm needs a capture, and neither - nor"),
    (["diff", LINUX, LINUX, "--limit", "-1"], "argument --limit: must be at least 0, got -1"),
], ids=lambda value: " ".join(map(str, value))[-40:].replace("/", "_") if isinstance(value, list) else "")
def test_mistakes(refused, argv, message):
    refused(message, *argv)


@pytest.mark.parametrize("damage, message", [
    (lambda text: b"", "is empty"),
    (lambda text: text[:1000], "is cut short"),
    (lambda text: text[:19], "line 1 is cut short"),
    (lambda text: text.replace(b"px ux", b"px uy", 1), "not attributes as Linux 7.2 prints them"),
    (lambda text: text[:100] + b"\xff" + text[101:], "line 3: not a range as Linux 7.2 prints it"),
    (lambda text: text.replace(b"0x", b"0\0", 1), "line 2: not a range as Linux 7.2 prints it: '0\\x00"),
    (lambda text: text.replace(b"-0x00000000090", b"-0x00000000080", 1), "but the line says"),
    (lambda text: b"\xef\xbb\xbf" + text, "line 1: must be"),
    (lambda text: text + text, "a range"),
], ids=["empty", "cut", "cut in the marker", "attributes", "not ascii", "nul", "number", "bom", "twice"])
def test_damaged_text(refused, text, damage, message):
    text.write_bytes(damage(text.read_bytes()))
    refused(message, "diff", LINUX, text)


@pytest.mark.parametrize("line", [b"M 2\n", b"AF BLK\n"], ids=["not mapped", "block"])
def test_flipped_bits(run, tmp_path, line):
    """Each bit of one line: refused in one line on stderr; only the level's digit can become another."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text(run("dump", NESTED, "--host", "--format", "kernel")[1])
    whole = good.read_bytes()
    end = whole.index(line) + len(line)
    start = whole.rindex(b"\n", 0, end - 1) + 1
    passed = []
    for at in range(start, end):
        for bit in range(8):
            bad.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1:])
            code, out, err = run("diff", good, bad)
            if code == 2:
                assert err.count("\n") == 1 and f"{bad}: line " in err and out == ""
            else:
                passed.append((at, code))
    level = whole.index(b" 2", start + 40) + 1
    # what is not mapped has no level to compare
    assert set(passed) == {(level, 1 if b"BLK" in line else 0)}


@pytest.mark.parametrize("damage, message", [
    (lambda text: text[:-50], "is not JSON"),
    (lambda text: text.replace('"level": 2', '"level": 7', 1), "ranges[0]: level must be a number from -1 to 3, got 7"),
    (lambda text: text.replace('"schema": 1', '"schema": 2'), "schema must be 1, got 2"),
    (lambda text: text.replace('"ipa_bits": 40', '"ipa_bits": 41'), "do not reach to the end of the IPA space"),
    (lambda text: '{"schema": 1, "ranges": []}', "do not reach to the end of the IPA space (ipa_bits is None)"),
    (lambda text: "[1]", "is no dump: it has no ranges"),
    (lambda text: "[" * 100_000, "is not JSON"),
    (lambda text: text.replace('"end": "0x', '"end": "0y', 1), "ranges[0]: end must be a hexadecimal number in text"),
], ids=["cut", "level", "schema", "bits", "empty", "list", "deep", "number"])
def test_damaged_json(run, refused, tmp_path, damage, message):
    file = tmp_path / "dump.json"
    run("dump", LINUX, "--json", file)
    file.write_text(damage(file.read_text()))
    refused(message, "diff", LINUX, file)
