"""Damaged captures, traces, dumps, specs and arguments: each ends in one clear line or in a result, and in whole files.

``S2SHADOW_LONG=1`` runs 10,000 mutations of each kind (``.ci/long/mutations``). A failure names the kind, the number
and the seed: ``S2SHADOW_SEED=… pytest tests/test_mutations.py -k KIND`` repeats it.
"""

import gzip
import io
import json
import lzma
import os
import random
from collections import Counter
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import pytest

import mutate
from mutate import Target
from s2shadow.cli import main
from seed import SEED
from test_cli_replay import SLOT
from test_replay import GUEST, HOST_VA, PAGE
from tracetext import Trace

DATA = Path(__file__).parent / "data"
CAPTURES = DATA / "captures"
LONG = os.environ.get("S2SHADOW_LONG") == "1"
COUNT = 10_000 if LONG else 50
PLAIN = CAPTURES / "b_linux_l2_thp_7.2" / "03_ballooned"
NESTED = CAPTURES / "g2_nested_notifier_7.2" / "00_early"
TINY_STORM = ("--contexts", "2", "--events", "2", "--seconds", "0.001")

TABLES = (mutate.mutate_bytes, mutate.mutate_archive, mutate.mutate_archive, mutate.mutate_archive)
JSON = (mutate.mutate_bytes, mutate.mutate_text, mutate.mutate_json, mutate.mutate_json)
TEXT = (mutate.mutate_bytes, mutate.mutate_text)


def output_of(*argv):
    """What the command prints, as bytes."""
    file = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", file)
        assert main([str(argument) for argument in argv]) == 0
    return file.getvalue().encode()


def files_of(folder, under):
    return {f"{under}/{file.name}": file.read_bytes() for file in folder.iterdir()}


def host_trace():
    """A host with a guest hypervisor: L2 touches, notifiers, TLBIs of L1, memory slots."""
    trace = Trace()
    trace.enter_l2(0)
    for page in range(6):
        trace.fault(page % 2, GUEST + page * PAGE, write=page % 3 == 0)
    trace.tlbi_ipa(0, GUEST + PAGE)
    trace.unmap_hva(HOST_VA, HOST_VA + 2 * PAGE)
    trace.map(0x1000, GUEST, 0x8000_0000)
    trace.probe("memslot", f"slot=1 flags=1 gpa=0x{GUEST:x} size=0x10000 hva=0x{HOST_VA:x}")
    trace.probe("mn_start", f"start=0x{HOST_VA:x} end=0x{HOST_VA + PAGE:x} event=1")
    trace.probe("mn_end", f"start=0x{HOST_VA:x} end=0x{HOST_VA + PAGE:x}")
    trace.exit_l2(0)
    trace.enter_l2(1)
    for page in range(6):
        trace.fault(page % 2, GUEST + page * PAGE)
    return ("\n".join(trace.lines) + "\n").encode()


def guest_trace():
    """A host that plays L1: it edits its tables and flushes."""
    trace = Trace()
    root = 0x4000_0000
    for page in range(4):
        trace.fault(0, GUEST + page * PAGE)
        trace.map(root, GUEST + page * PAGE, 0x8000_0000 + page * PAGE)
    trace.map(root, 0x20_0000, 0x9000_0000, size=2 << 20)
    trace.probe("wrprotect", f"pgd=0x{root:x} ipa=0x{GUEST:x} size=0x2000")
    trace.probe("tlb_ipa", f"pgd=0x{root:x} ipa=0x{GUEST:x} level=3")
    trace.probe("split", f"pgd=0x{root:x} ipa=0x200000 size=0x200000")
    trace.probe("relax", f"pgd=0x{root:x} ipa=0x{GUEST:x} prot=0xe")
    trace.probe("mkyoung", f"pgd=0x{root:x} ipa=0x{GUEST:x}")
    trace.probe("age", f"pgd=0x{root:x} ipa=0x{GUEST:x} size=0x4000 mkold=1")
    trace.probe("unmap", f"pgd=0x{root:x} ipa=0x{GUEST:x} size=0x4000")
    trace.probe("tlb_range", f"pgd=0x{root:x} start=0x{GUEST:x} pages=4")
    trace.vcpu(0, "tracing_mark_write: {\"snapshot\": \"begin\"}")
    trace.unmap_hva(HOST_VA, HOST_VA + 2 * PAGE)
    trace.probe("tlb_vmid", f"pgd=0x{root:x}")
    trace.probe("destroy", f"pgd=0x{root:x}")
    return ("\n".join(trace.lines) + "\n").encode()


def table_csv():
    """The first lines of a real CSV of instructions."""
    return b"\n".join(lzma.decompress((DATA / "traces" / "a.tlbi.csv.xz").read_bytes()).split(b"\n")[:40]) + b"\n"


def saved_events():
    from s2shadow.trace import read_trace

    packed = io.BytesIO()
    np.savez(packed, events=np.concatenate(list(read_trace(io.BytesIO(guest_trace())))))
    return packed.getvalue()


SPEC = b"""\
contexts = [1, 2]
pages = 8       # of 4K
aliases = 1
block_mix = [0.0, 0.5]
events = 3
teardown = ["reverse-map", "blow-away"]
seconds = 0.001
min_events = 1

[[grid]]
event_pages = 1
write = true
tlbi = "kvm72"

[[grid]]
capture = "shipped"
vm = 0
seed = [1, 2]
track_tlbis = false
"""

TINY_SPEC = b"pages = 8\nevents = 2\nseconds = 0.001\nmin_events = 1\nteardown = ['reverse-map', 'blow-away']\n" \
            b"contexts = [1, 2]\n"

STORM_RESULT = {"schema": 1}


def capture_target():
    folder = "@/capture"
    reading = (("walk", folder, "0x40000000", "0x80123000", "--explain"),
               ("walk", folder, "0", "0xffffffffff", "--access", "rwx", "--json", "@/out/walk.json"),
               ("dump", folder, "--csv", "@/out/dump.csv"), ("dump", folder, "--format", "kernel"),
               ("dump", folder, "-o", "@/out/kernel"), ("dump", folder, "--json", "@/out/dump.json"),
               ("diff", folder, str(PLAIN), "--json", "@/out/diff.json"),
               ("storm", "--capture", folder, *TINY_STORM, "--json", "@/out/storm.json"),
               ("replay", str(DATA / "traces" / "a.tlbi.csv.xz"), "--memory", folder, "--role", "l1"))
    return Target(files_of(PLAIN, "capture"), reading,
                  {"capture/tables.npz": TABLES, "capture/registers.json": JSON})


def nested_target():
    folder = "@/capture"
    reading = (("walk", folder, "0x40000000", "0", "--explain"), ("walk", folder, "0", "--tables", "host"),
               ("dump", folder, "--host"), ("dump", folder, "--nested", "0", "--json", "@/out/dump.json"),
               ("dump", folder, "--engine", "--csv", "@/out/dump.csv"), ("dump", folder, "-o", "@/out/kernel"),
               ("diff", folder, "--engine", "--csv", "@/out/diff.csv"),
               ("dump", folder, "--engine", "-o", "@/out/kernel"))
    return Target(files_of(NESTED, "capture"), reading,
                  {"capture/tables.npz": TABLES, "capture/l1_tables.npz": TABLES, "capture/registers.json": JSON})


def dump_target():
    kernel = output_of("dump", PLAIN, "--format", "kernel")
    return Target({"dump": kernel}, (("diff", "@/dump", str(PLAIN)), ("diff", str(PLAIN), "@/dump", "--json"),
                                     ("diff", "@/dump", "@/dump", "--csv", "@/out/diff.csv")),
                  {"dump": TEXT})


def dump_json_target():
    small = json.loads(output_of("dump", NESTED, "--host", "--json"))
    return Target({"dump.json": json.dumps(small, indent=1).encode()},
                  (("diff", "@/dump.json", str(PLAIN), "--json", "@/out/diff.json"),
                   ("diff", "@/dump.json", "@/dump.json", "--access-flag", "--csv", "@/out/diff.csv")),
                  {"dump.json": JSON})


def trace_target(trace, *options):
    """Plain and packed."""
    files = {"trace.txt": trace, "trace.txt.gz": gzip.compress(trace), "trace.txt.xz": lzma.compress(trace)}
    commands = tuple(command for name in ("trace.txt", *files) for command in (
        ("replay", f"@/{name}", *options, "--json", "@/out/replay.json", "--report", "@/out/page.html"),
        ("replay", f"@/{name}", *options, "--teardown", "reverse-map", "--csv")))
    return Target(files, commands, {"trace.txt": (*TEXT, mutate.mutate_text, mutate.mutate_text),
                                    "trace.txt.gz": (mutate.mutate_bytes, mutate.gzipped_text),
                                    "trace.txt.xz": (mutate.mutate_bytes, mutate.xz_text)})


def folder_target():
    """A capture folder with everything that a replay finds there."""
    nested = {f"capture/00_early/{name.partition('/')[2]}": data for name, data in files_of(NESTED, "x").items()}
    files = {**nested, "capture/trace.txt": host_trace(), "capture/tlbi.csv": table_csv(),
             "capture/memslots.json": (DATA / "traces" / "g2.memslots.json").read_bytes(),
             "capture/checks.json": (DATA / "replay" / "d_vmids" / "checks.json").read_bytes()}
    damage = {name: JSON if name.endswith(".json") else TABLES if name.endswith(".npz") else TEXT for name in files}
    return Target(files, (("replay", "@/capture", "--json", "@/out/replay.json"),
                          ("replay", "@/capture", "--role", "l1", "--teardown", "reverse-map"),
                          ("replay", "@/capture", "--role", "l0", "--report", "@/out/page.html")), damage)


def spec_target():
    return Target({"spec.toml": SPEC},
                  (("sweep", "@/spec.toml", "--list"),
                   ("sweep", "@/spec.toml", "--executor", "dask:nowhere.json", "-o", "@/out/out.csv")),
                  {"spec.toml": TEXT})


def journal_target(folder):
    (folder / "spec.toml").write_bytes(TINY_SPEC)
    output_of("sweep", folder / "spec.toml", "-o", folder / "out.csv")
    files = {name: (folder / name).read_bytes() for name in ("spec.toml", "out.csv.journal")}
    return Target(files, (("sweep", "@/spec.toml", "-o", "@/out.csv", "--json", "@/out/sweep.json"),
                          ("sweep", "@/spec.toml", "-o", "@/out.csv", "--csv", "@/out/sweep.csv")),
                  {"out.csv.journal": (mutate.mutate_bytes, mutate.mutate_journal, mutate.mutate_journal)})


def argument_target():
    return Target({}, (
        ("walk", str(PLAIN), "0x40000000", "0x80000000", "--access", "rw", "--vm", "0", "--tables", "auto"),
        ("walk", str(NESTED), "4096", "--tables", "host", "--explain", "--json", "@/out/walk.json"),
        ("tlbi", "RIPAS2E1IS", "0x0000400000080123", "--vtcr", "0x802d3558"), ("tlbi", "0xd50c8041", "0x1"),
        ("tlbi", "VAE2IS", "1", "--csv", "@/out/tlbi.csv"),
        ("dump", str(NESTED), "--nested", "0"), ("dump", str(PLAIN), "--vm", "0", "-o", "@/out/kernel"),
        ("diff", str(NESTED), "--engine", "--limit", "3", "--strict"), ("diff", str(PLAIN), str(PLAIN), "--vm", "0"),
        ("replay", "@/trace.txt", "--memslot", SLOT, "--vcpus", "2", "--contexts", "4", "--role", "l0"),
        ("replay", "@/trace.txt", "--memslot", "gpa=0,hva=4096,size=4K,vm=1", "--tlbi", "kvm72", "--report",
         "@/out/page.html"),
        ("storm", "--contexts", "2", "--events", "10", "--event-pages", "2", "--seed", "3", "--seconds", "1",
         "--teardown", "reverse-map,blow-away", "--json", "@/out/storm.json"),
        ("storm", "--synthetic", "--pages", "64", "--aliases", "2", "--block-mix", "0.5", "--tlbi", "exact"),
        ("sweep", "@/spec.toml", "--workers", "1", "--retries", "2", "-o", "@/out/out.csv", "--x", "pages", "--list"),
    ))


class Here(Executor):
    """Runs a point where it is submitted."""

    def __init__(self, workers):
        del workers

    def submit(self, run, config):
        future = Future()
        future.set_result(run(config))
        return future


@pytest.fixture
def no_storm(monkeypatch):
    """Whatever the arguments ask for is not run: a sound storm of three hours is no bad input."""
    from s2shadow import storm

    def run(config, progress=None):
        return shown
    shown = storm.run(storm.StormConfig(synthetic=True, pages=8, events=2, seconds=0.001, contexts=1))
    monkeypatch.setattr(storm, "run", run)


def hurt(target, name, tmp_path, notes):
    """Run a target's mutations; the first that is not answered as it should be fails."""
    folder = tmp_path / "files"
    folder.mkdir()
    target.write(folder)
    seen = Counter()
    for i in range(20 * COUNT):
        if i >= COUNT and seen[2]:
            break                           # of some kinds few mutations are more than a counted line
        rng = random.Random(f"{SEED} {name} {i}")
        mutate.clear(folder / "out")
        argv, damaged = target.damaged(folder, rng)
        try:
            code, wrong = mutate.answer(argv, folder / "out")
            kept = "" if damaged is None else f"\nthe file is {keep(folder / damaged, tmp_path)}"
            assert wrong is None, f"S2SHADOW_SEED={SEED}, {name} {i}: s2shadow {' '.join(argv)!r}: {wrong}{kept}"
        finally:
            if damaged is not None:
                target.write(folder)
        seen[code] += 1
    if LONG:
        notes.append(f"{name}: {COUNT:,} mutations, exit codes {dict(sorted(seen.items()))}")
    assert seen[2], "nothing was damaged"


def keep(file, folder):
    copy = folder / f"damaged-{file.name}"
    copy.write_bytes(file.read_bytes())
    return copy


TARGETS = {
    "capture": capture_target, "nested": nested_target, "dump": dump_target, "dump-json": dump_json_target,
    "capture-folder": folder_target, "spec": spec_target,
    "host-trace": lambda: trace_target(host_trace(), "--memslot", SLOT),
    "guest-trace": lambda: trace_target(guest_trace()),
    "csv": lambda: Target({"tlbi.csv": table_csv()}, (("replay", "@/tlbi.csv", "--json", "@/out/replay.json"),
                                                      ("replay", "@/tlbi.csv", "--role", "l0", "--csv")),
                          {"tlbi.csv": TEXT}),
    "saved-events": lambda: Target({"events.npz": saved_events()}, (
        ("replay", "@/events.npz", "--json", "@/out/replay.json"), ("replay", "@/events.npz", "--role", "l0")),
        {"events.npz": TABLES}),
}


@pytest.mark.parametrize("name", TARGETS)
def test_files(name, tmp_path, notes):
    hurt(TARGETS[name](), name, tmp_path, notes)


def test_journal(tmp_path, notes, monkeypatch):
    monkeypatch.setattr("s2shadow.sweep.WorkerPool", Here)
    (tmp_path / "made").mkdir()
    hurt(journal_target(tmp_path / "made"), "journal", tmp_path, notes)


def test_arguments(tmp_path, notes, no_storm, monkeypatch):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "trace.txt").write_bytes(host_trace())
    (folder / "spec.toml").write_bytes(SPEC)
    monkeypatch.chdir(folder)
    hurt_arguments = argument_target()
    folder.rename(tmp_path / "kept")
    target = Target({name.name: name.read_bytes() for name in (tmp_path / "kept").iterdir()}, hurt_arguments.commands)
    hurt(target, "arguments", tmp_path, notes)
