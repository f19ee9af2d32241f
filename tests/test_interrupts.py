"""Ctrl-C: what runs long stops soon, keeps what it has done, and leaves an engine that is sound and goes on."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import s2shadow as s2
from rig import DATA, PAGE, RAM, M, Rig
from s2shadow import HIT, MAPPED, READ
from s2shadow._floor import chase
from test_mutations import guest_trace, host_trace

MANY = 1_500_000
PAGES = 512


@contextlib.contextmanager
def interrupted(after):
    """``KeyboardInterrupt`` in this thread, as Ctrl-C makes it, in ``after`` seconds; it must come."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, after)
            yield
            time.sleep(60)              # it came to its end before: then this is what is interrupted
            pytest.fail("no signal")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def r():
    r = Rig()
    for page in range(PAGES):
        r.tables.map(page * PAGE, DATA + page * PAGE)
    return r


@pytest.fixture
def ipas():
    return np.tile(np.arange(PAGES, dtype=np.uint64) * np.uint64(PAGE), MANY // PAGES)


def stopped_early(out):
    """How much of a zeroed output was filled: the beginning, and nothing behind it."""
    done = int(np.count_nonzero(out["size"]))
    assert 0 < done < len(out) and (out["size"][:done] != 0).all()
    return done


def goes_on(r):
    r.vm.check()
    assert r.fault(0).kind == HIT
    assert r.vm.unmap(DATA, DATA + PAGE).leaves == 1
    assert r.fault(PAGE).kind == HIT
    r.vm.check()


def test_fault_many(r, ipas):
    """The rows before the signal are answers, counted once; those behind it were not touched."""
    out = np.zeros(len(ipas), s2.FAULT_DTYPE)
    before = r.vm.stats.faults
    with interrupted(0.002):
        r.vcpu.fault_many(ipas, READ, out=out)
    done = stopped_early(out)
    assert np.isin(out["kind"][:done], (HIT, MAPPED)).all()
    assert r.vm.stats.faults - before == done
    goes_on(r)


def test_translate_many(r, ipas):
    r.vcpu.fault_many(ipas[:PAGES], READ)
    out = np.zeros(len(ipas), s2.FAULT_DTYPE)
    with interrupted(0.002):
        r.vcpu.translate_many(ipas, READ, out=out)
    assert (out["pa"][:stopped_early(out)] != 0).all()
    goes_on(r)


def test_walk_many(r, ipas):
    out = np.zeros(len(ipas), s2.WALK_DTYPE)
    cfg = s2.Stage2Config(r.tables.vttbr(), r.tables.vtcr)
    mem = s2.GuestMemory()
    mem.add(RAM, 2 * M)
    mem.write(RAM, r.mem.read(RAM, 2 * M))
    with interrupted(0.002):
        s2.walk_many(mem, cfg, ipas, READ, out=out)
    stopped_early(out)
    mem.remove(RAM)                             # refused while a walk holds it


def test_tlbi_many(r):
    """Either nothing was applied yet, or a beginning."""
    r.vcpu.fault_many(np.arange(PAGES, dtype=np.uint64) * np.uint64(PAGE))
    ops = np.zeros(MANY, s2.TLBI_OP_DTYPE)
    ops["insn"] = 0xD50C_8020                   # IPAS2E1IS of IPA 0
    before = r.vm.stats.tlbis["IPA"].operations
    with interrupted(0.03):
        r.vm.tlbi_many(ops)
    assert r.vm.stats.tlbis["IPA"].operations - before < MANY
    r.fault(0)
    goes_on(r)


def test_leaves():
    """Tables that loop, as far as their limit allows."""
    mem = s2.GuestMemory()
    mem.add(0x4000_0000, 4 * PAGE)
    for level in range(3):
        mem.write(0x4000_0000 + level * PAGE, np.full(512, 0x4000_0003 + (level + 1) * PAGE, "<u8"))
    cfg = s2.Stage2Config(1 << 48 | 0x4000_0000, 0x8002_3590)
    with interrupted(0.02):
        s2.leaves(mem, cfg)
    mem.remove(0x4000_0000)


def test_floor():
    with interrupted(0.02):
        chase(1 << 26, steps=1 << 24)


def test_populate(r, ipas):
    """In the callable that the engine asks: the fault under way is undone, those before it are done."""
    asked = []

    def populate(cipa, access):
        asked.append(cipa)
        if len(asked) == 20:
            raise KeyboardInterrupt
        return s2.HostMapping(cipa + (1 << 40), PAGE)

    r.vm.unmap(0, 1 << 47)
    r.vm.host.populate = populate
    out = np.zeros(PAGES, s2.FAULT_DTYPE)
    with pytest.raises(KeyboardInterrupt):
        r.vcpu.fault_many(ipas[:PAGES], READ, out=out)
    assert out["kind"][:19].tolist() == [MAPPED] * 19 and r.vm.stats.live == 19
    r.vm.check()
    assert (r.vcpu.fault_many(ipas[:PAGES], READ)["kind"] <= MAPPED).all()


@pytest.mark.parametrize("seed", range(4))
def test_anywhere(r, seed):
    """A long run of every kind of call, interrupted again and again wherever it is."""
    rng = random.Random(seed)
    ipas = np.arange(PAGES, dtype=np.uint64) * np.uint64(PAGE)
    ops = np.zeros(64, s2.TLBI_OP_DTYPE)
    ops["insn"], ops["xt"] = 0xD50C_8020, np.arange(64)

    def work():
        for _ in range(1_000_000):
            r.vcpu.fault_many(ipas, READ)
            page = rng.randrange(PAGES)
            r.vm.unmap(DATA + page * PAGE, DATA + (page + 3) * PAGE)
            r.vm.host.map(DATA + page * PAGE, DATA + (1 << 36) + page * PAGE, 3 * PAGE)
            r.vm.tlbi_many(ops)
            r.vm.log_dirty(DATA, DATA + PAGES * PAGE, bool(page & 1))
            r.vcpu.load(r.tables.vttbr(1 + (page & 3)), r.tables.vtcr)

    for _ in range(20):
        with interrupted(rng.uniform(0.0005, 0.01)):
            work()
        r.vm.check()
    r.vcpu.load(r.tables.vttbr(), r.tables.vtcr)
    assert np.isin(r.vcpu.fault_many(ipas, READ)["kind"], (HIT, MAPPED, s2.HOST_FAULT)).all()


# --- the tools ---------------------------------------------------------------------------------------------------

COMMANDS = {
    "storm": ("storm", "--events", "1000000", "--json", "OUT"),
    "storm of another policy": ("storm", "--synthetic", "--pages", "4096", "--teardown", "blow-away", "--seconds",
                                "600", "--json", "OUT"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command(name, tmp_path):
    """Exit code 130, nothing on stderr, and a whole JSON of what was done until then."""
    out = tmp_path / "out.json"
    argv = [str(out) if word == "OUT" else word for word in COMMANDS[name]]
    environment = {**os.environ, "PYTHONPATH": str(Path(s2.__file__).parents[1])}
    code = ("import sys, s2shadow.storm as storm\n"
            "real = storm.Rig.round\n"
            "def first(*args):\n"
            "    storm.Rig.round = real\n"
            "    print('at work', flush=True)\n"
            "    return real(*args)\n"
            "storm.Rig.round = first\n"
            "from s2shadow.cli import main\n"
            "raise SystemExit(main(sys.argv[1:]))\n")
    with subprocess.Popen([sys.executable, "-c", code, *argv], env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == "at work\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        text, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert "Interrupted: the figures are of the rounds until then." in text
    result = json.loads(out.read_text())
    assert result["interrupted"] and result["policies"][next(iter(result["policies"]))]["events"] >= 1
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


def asked_enums(work):
    """How often numpy asked a class of enums for what it does not have, where a signal's exception would be lost."""
    asked = []

    def look(frame, event, _argument):
        called, by = (Path(at.f_code.co_filename).name if at else "" for at in (frame, frame.f_back))
        if event == "call" and frame.f_code.co_name == "__getattr__" and called == "enum.py" != by:
            asked.append((by, frame.f_back.f_lineno))
    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
    return asked


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="a class of enums is asked without Python code from 3.12 on")
def test_numpy_is_given_plain_numbers(run, tmp_path):
    """Comparing an array with a member of an enum runs Python code in the midst of numpy, which loses Ctrl-C there."""
    assert asked_enums(lambda: np.zeros(3, dtype=np.uint8) == MAPPED)
    (tmp_path / "host.txt").write_bytes(host_trace())
    (tmp_path / "guest.txt").write_bytes(guest_trace())
    for argv in (("storm", "--synthetic", "--pages", "64", "--contexts", "2", "--events", "50", "--event-pages", "16",
                  "--seconds", "0.05"),
                 ("replay", tmp_path / "host.txt"), ("replay", tmp_path / "guest.txt")):
        assert asked_enums(lambda argv=argv: run(*argv)) == []
