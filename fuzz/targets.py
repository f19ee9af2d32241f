"""What is fuzzed: functions of bytes. Whatever they are given they must come back: only documented errors are caught.

Each takes its input apart with ``Input``, which never ends: past the last byte everything is 0. ``run.py`` drives one
under libFuzzer; ``tests/test_fuzz_corpora.py`` runs what earlier runs found interesting.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

import s2shadow as s2
from s2shadow.capture import CaptureError
from s2shadow.capturedtables import engine_table, vm_table
from s2shadow.commands.diff import read_dump
from s2shadow.dump import DumpError, diff, is_kernel_text, kernel_text, parse_kernel_text, records
from s2shadow.memslots import Memslots
from s2shadow.trace import TraceError, VMNumbers, read_trace, tlbi_ops

__all__ = ["TARGETS"]

PAGE = 4096
RAM, PAGES = 0x4000_0000, 32        # of guest memory; the first 16 pages hold tables, the next 4 are read-only
TABLES = 16
ROM = RAM + PAGES * PAGE
DEVICE = ROM + 4 * PAGE
HOST = 0x10_0000_0000
ACCESSES = (s2.READ, s2.WRITE, s2.EXEC, s2.READ | s2.WRITE, s2.EXEC | 8, s2.READ | 8, s2.READ | 16, s2.WRITE | 16, 31,
            0)


class Input:
    def __init__(self, data: bytes):
        self.data = data
        self.at = 0

    def __bool__(self) -> bool:
        return self.at < len(self.data)

    def bytes(self, count: int) -> bytes:
        piece = self.data[self.at:self.at + count]
        self.at += count
        return piece.ljust(count, b"\0")

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def word(self, size: int = 8) -> int:
        return int.from_bytes(self.bytes(size), "little")

    def rest(self) -> bytes:
        self.at, at = len(self.data), self.at
        return self.data[at:]


# --- what walker and engine run on -------------------------------------------------------------------------------


def features(source: Input) -> s2.Features:
    bits = source.word(2)
    wide = bool(bits & 1)
    return s2.Features(pa_bits=52 if wide else (48, 44, 40, 36)[bits >> 1 & 3], lpa=wide, lpa2=wide, ttl=bool(bits & 8),
                       range=bool(bits & 16), fwb=bool(bits & 32), ttst=bool(bits & 64), hafdbs=bits >> 7 & 1 | 1,
                       vmid_bits=16 if bits & 0x200 else 8, tlbios=bool(bits & 0x400), xs=bool(bits & 0x800),
                       bbm=bool(bits & 0x1000), s2pie=bool(bits & 0x2000))


def memory() -> s2.GuestMemory:
    mem = s2.GuestMemory()
    mem.add(RAM, PAGES * PAGE)
    mem.add(ROM, buffer=bytearray(4 * PAGE), readonly=True)
    mem.add(DEVICE, PAGE, device=True)
    return mem


def address(source: Input) -> int:
    """Mostly a page of the guest's."""
    byte = source.byte()
    if byte < 0xF0:
        return RAM + byte % (PAGES + 8) * PAGE
    return source.word(7) & ~0xFFF


def descriptor(source: Input) -> int:
    """Any word, or one whose address bits lead to a page of the guest's."""
    kind = source.byte()
    if kind >= 0xF8:
        return source.word()
    low, high = source.word(2), source.byte()
    if kind < 0x60:                     # a table, or a page at the last level
        return address(source) | 3 | low & 0xFFC
    if kind < 0xC0:                     # attributes of a leaf that works
        return address(source) | 0x7C0 | (low & 0x3F) | high << 51
    return address(source) | low & 0xFFF | high << 56 | (low & 0xF000) << 36


def vtcr(source: Input) -> int:
    """Any, or what is mostly sound: 4K from level 1, 2 or 3."""
    kind = source.byte()
    if kind < 0x20:
        return source.word()
    value = (0x8002_3558, 0x8002_3598, 0x8002_3590, 0x8002_3518)[kind & 3] | (kind & 0x10) << 17 | (kind & 4) << 20
    return value & ~0x3F | source.byte() & 0x3F if kind & 8 else value


def vttbr(source: Input) -> int:
    value = source.byte()
    return (value & 7) << 48 | (RAM + (value >> 3 & 3) * PAGE * (2 if value & 0x20 else 1)) | value >> 6 & 1


def hcr(source: Input) -> int:
    value = source.byte()
    return int(s2.HCR_VM) if value < 0x80 else source.word() if value >= 0xF0 else (value & 1) | (value & 2) << 45 | (
        value & 4) << 30


def write_tables(mem: s2.GuestMemory, source: Input, count: int, big_endian: bool = False) -> None:
    for _ in range(count):
        page, slot = source.byte() % TABLES, source.byte()
        word = descriptor(source)
        mem.write64(RAM + page * PAGE + (slot * 8 if slot < 0xE0 else (slot * 16 & 0xFF8)),
                    int.from_bytes(word.to_bytes(8, "little"), "big") if big_endian else word)


def ipa(source: Input) -> int:
    byte = source.byte()
    if byte < 0x80:
        return (byte & 7) << 12 | (byte >> 3 & 3) << 21 | (byte >> 5) << 30
    return source.word() if byte >= 0xF8 else source.word(6) & (1 << (byte & 0x3F)) - 1


# --- walker ------------------------------------------------------------------------------------------------------


def walker(data: bytes) -> None:
    """Walks of made-up tables, in four ways that must agree, and the list of leaves."""
    source = Input(data)
    has = features(source)
    big_endian = source.byte() > 0xE0
    cfg = s2.Stage2Config(vttbr(source), vtcr(source), features=has, hcr=hcr(source), big_endian=big_endian,
                          s2pir=source.word() if has.s2pie else 0)
    mem = memory()
    write_tables(mem, source, source.byte() % 64, big_endian)
    tables = mem.read(RAM, PAGES * PAGE)
    ipas, accesses = [], []
    while source and len(ipas) < 32:
        ipas.append(ipa(source))
        accesses.append(ACCESSES[source.byte() % len(ACCESSES)])
    for at, access in zip(ipas, accesses, strict=True):
        plain, traced = (s2.walk(mem, cfg, at, access, update=False, trace=trace) for trace in (False, True))
        stepped = step_through(mem, cfg, at, access)
        assert shown(plain) == shown(traced) == shown(stepped), (plain, traced, stepped)
    assert mem.read(RAM, PAGES * PAGE) == tables
    if ipas:
        rows = s2.walk_many(mem, cfg, np.array(ipas, np.uint64), np.array(accesses, np.uint8), update=False)
        for at, access, row in zip(ipas, accesses, rows, strict=True):
            found = s2.walk(mem, cfg, at, access, update=False)
            assert all(getattr(found, name) == row[name] for name in ("pa", "size", "status", "fsc", "level", "perm"))
        s2.walk_many(mem, cfg, np.array(ipas, np.uint64), np.array(accesses, np.uint8))
    try:
        found = s2.leaves(mem, cfg, 4096)
    except ValueError:
        return
    assert (found["ipa"][1:] > found["ipa"][:-1]).all()


def step_through(mem: s2.GuestMemory, cfg: s2.Stage2Config, at: int, access: int) -> s2.Walk:
    """The walk whose memory is the caller's."""
    step = s2.walk_step(cfg, at, access, False)
    for _ in range(64):
        request = step.request
        if request is None:
            return step.result
        assert request.kind == "read", request
        try:
            step.feed(mem.read64(request.address))
        except ValueError:
            step.abort()
    raise AssertionError("the walk does not end")


def shown(walk: s2.Walk) -> tuple[object, ...]:
    return (walk.status, walk.fsc, walk.level, walk.pa, walk.size, walk.perm, walk.desc, walk.updated)


# --- TLBI decoder ------------------------------------------------------------------------------------------------


def tlbi(data: bytes) -> None:
    """Any instruction word, name or tuple, with any operand: decoded, and applied to an engine, singly and as rows."""
    source = Input(data)
    has = features(source)
    control = vtcr(source)
    mem = memory()
    mem.write64(RAM, RAM + 2 * PAGE | 3)
    mem.write64(RAM + 2 * PAGE, RAM + 3 * PAGE | 3)
    for page in range(8):
        mem.write64(RAM + 3 * PAGE + page * 8, RAM + (TABLES + page) * PAGE | 0x7DF)
    try:
        vm = s2.NestedVM(mem, features=has)
    except ValueError:
        return                          # 52-bit addresses
    vm.host.populate = s2.Linear(HOST if has.pa_bits >= 40 else 0)
    vcpu = vm.vcpus[0]
    vcpu.load(1 << 48 | RAM, 0x8002_3558)
    pages = np.arange(8, dtype=np.uint64) * np.uint64(PAGE)
    rows = []
    while source and len(rows) < 32:
        vcpu.fault_many(pages)
        kind, operand = source.byte(), source.word()
        op = (0xD508_0000 | source.word(2) | (kind & 7) << 16 if kind < 0xE0 else
              tuple(source.byte() for _ in range(4)) if kind < 0xF0 else source.word(4))
        try:
            for dialect in ("exact", "kvm72"):
                found = s2.decode_tlbi(op, operand, features=has, vtcr=control, dialect=dialect)
                assert (found.start is None) == (found.end is None)
                assert found.start is None or found.start < found.end
        except s2.UndefinedInstruction:
            continue
        except (ValueError, TypeError):
            assert not isinstance(op, int) or op >> 32
            continue
        result = vcpu.tlbi(op, operand, vttbr=vttbr(source), vtcr=control, hcr=hcr(source))
        assert result.required <= result.removed
        if isinstance(op, int):
            rows.append((0, op, 1, operand, 1 << 48 | RAM, control, int(s2.HCR_VM)))
    ops = np.zeros(len(rows), s2.TLBI_OP_DTYPE)
    for i, row in enumerate(rows):
        for name, value in zip(("vcpu", "insn", "flags", "xt", "vttbr", "vtcr", "hcr"), row, strict=True):
            ops[i][name] = value
    vm.tlbi_many(ops)
    vm.check()


# --- trace parser ------------------------------------------------------------------------------------------------


def trace(data: bytes) -> None:
    """Text of ftrace, perf and trace-cmd, a CSV, or saved events; packed or not. Then what a replay does first."""
    source = Input(data)
    choice = source.byte()
    reader = read_trace(io.BytesIO(source.rest()), chunk=1 + (choice >> 2) * 7, page=4096 << 2 * (choice % 3))
    numbers = VMNumbers()
    try:
        for events in reader:
            assert 0 < len(events) <= 1 + (choice >> 2) * 7
            numbers.number(events)
            tlbi_ops(events)
            try:
                Memslots.from_events(events).to_ipa(events)
            except ValueError:
                pass
    except TraceError as error:
        assert str(error).strip() and "\n" not in str(error)
        return
    assert reader.rows or reader.events or reader.format == "saved"


# --- captures ----------------------------------------------------------------------------------------------------


def capture(data: bytes) -> None:
    """registers.json as text, and an archive that is raw bytes, or made of words so that its checksums are right."""
    source = Input(data)
    kind = source.byte()
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None, prefix="s2shadow-fuzz-"))
    try:
        (folder / "registers.json").write_bytes(source.bytes(min(source.word(2), len(data))).rstrip(b"\0"))
        (folder / "tables.npz").write_bytes(source.rest() if kind & 1 else archive(source))
        if kind & 2:
            (folder / "l1_tables.npz").write_bytes(archive(source))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for which in ("auto", "host", "l1"):
                load(folder, which)
            for table in (lambda: vm_table(folder), lambda: engine_table(folder, 0)):
                try:
                    records(table().rows[:64])
                except (CaptureError, DumpError) as error:
                    assert "\n" not in str(error)
    finally:
        shutil.rmtree(folder)


def load(folder: Path, which: str) -> None:
    mem = s2.GuestMemory()
    try:
        found = mem.load_tables(folder, which)
    except CaptureError as error:
        assert str(folder) in str(error) and "\n" not in str(error), error
        assert not mem.regions
        return
    for vm in found.vms:
        s2.walk(mem, vm.config(), 0x1000, update=False)
    if found.host is not None:
        host = s2.NestedVM(s2.GuestMemory()).host
        try:
            host.load(*found.host)
        except ValueError:
            pass


def archive(source: Input) -> bytes:
    count = source.byte() % 6
    addresses = np.array([address(source) for _ in range(count)], np.uint64)
    pages = np.zeros((count, PAGE), np.uint8)
    words = pages.view(np.uint64)
    for _ in range(source.byte() % 32 if count else 0):
        words[source.byte() % count, source.byte()] = descriptor(source)
    packed = io.BytesIO()
    np.savez(packed, addresses=addresses, pages=pages)
    return packed.getvalue()


# --- dumps -------------------------------------------------------------------------------------------------------


def dump(data: bytes) -> None:
    """Kernel text or JSON, by its first byte; what can be read is written again, and equals itself."""
    try:
        rows = read_dump(io.BytesIO(data), "fuzz")
    except DumpError as error:
        assert str(error).startswith("fuzz") and "\n" not in str(error), error
        return
    json.dumps(records(rows), allow_nan=False)
    assert not len(diff(rows, rows, access_flag=True))
    try:
        text = kernel_text(rows)
    except DumpError:
        return
    again = parse_kernel_text(text)
    assert kernel_text(again) == text
    assert not is_kernel_text(rows) or not len(diff(rows, again))


# --- engine ------------------------------------------------------------------------------------------------------

KINDS = (s2.HIT, s2.MAPPED, s2.L1_FAULT, s2.HOST_FAULT, s2.MMIO)
PARTIALS = (None, "split", "drop")
HOST_PERMS = ("rwx", "rw", "rx", "r", "w", "x")
TLBIS = ("IPAS2E1IS", "IPAS2LE1", "RIPAS2E1IS", "RIPAS2LE1IS", "VMALLS12E1IS", "ALLE1IS", "VMALLE1", "VAE1IS")


def engine(data: bytes) -> None:
    """A program of operations of a hostile L1 and of its host, one byte each with its operands."""
    source = Input(data)
    shape = source.byte()
    mem = memory()
    vm = s2.NestedVM(mem, vcpus=2, contexts=2 + (shape >> 2 & 1), teardown=s2.TEARDOWNS[shape & 3],
                     tlbi="kvm72" if shape & 0x10 else "exact", max_table_bytes=1 << 19 if shape & 8 else None,
                     attributes="kvm72" if shape & 0x20 else "architectural")
    vm.host.populate = s2.Linear(HOST) if shape & 0x40 else None
    if shape & 0x80:
        vm.host.map(RAM, RAM + HOST, PAGES * PAGE)
    decent_tables(mem)
    for vcpu in vm.vcpus:
        vcpu.load(1 << 48 | RAM, 0x8002_3558)
    for step in range(256):
        if not source:
            break
        operate(vm, mem, source)
        if step & 15 == 15:
            isolated(vm)
    isolated(vm)


def decent_tables(mem: s2.GuestMemory) -> None:
    """What a decent L1 has: 32 pages and a block, seen at several places. The programs take it apart."""
    leaf, read_only, block = 0x7DF, 0x75F, 0x7DD
    tables = {(0, 0): 4 * PAGE | 3, (0, 1): 4 * PAGE | 3, (0, 2): 5 * PAGE | 3, (4, 0): 6 * PAGE | 3,
              (4, 1): 7 * PAGE | 3, (4, 2): block, (5, 0): 7 * PAGE | 3, (5, 1): block}
    for i in range(16):
        tables[6, i] = (TABLES + i) * PAGE | leaf
        tables[7, i] = (TABLES + 15 - i) * PAGE | (read_only if i & 4 else leaf)
    tables[7, 6], tables[7, 7] = ROM - RAM | leaf, DEVICE - RAM | leaf
    for (page, slot), word in tables.items():
        mem.write64(RAM + page * PAGE + slot * 8, RAM + word)


def operate(vm: s2.NestedVM, mem: s2.GuestMemory, source: Input) -> None:
    op = source.byte()
    vcpu = vm.vcpus[op & 1]
    what = op >> 1 & 0x7F
    if what < 32:
        write_tables(mem, source, 1 + (what & 3))
    elif what < 64:
        fault(vcpu, ipa(source), ACCESSES[source.byte() % len(ACCESSES)])
    elif what < 76:
        count = source.byte()
        start = ipa(source) & (1 << 62) - 1
        out = vcpu.fault_many(np.uint64(start) + np.arange(count, dtype=np.uint64) * np.uint64(PAGE), 1 + (what & 1))
        assert np.isin(out["kind"], (*KINDS, s2.RETRY, s2.NO_MEMORY)).all()
    elif what < 80:
        vcpu.load(vttbr(source), vtcr(source), hcr=hcr(source), big_endian=source.byte() > 0xF0)
    elif what < 82:
        vcpu.put()
        vcpu.load(vttbr(source), 0x8002_3558)
    elif what < 94:
        name = TLBIS[source.byte() % len(TLBIS)]
        at = ipa(source)
        vcpu.tlbi(name, at >> 12 & (1 << 36) - 1 | (source.word(2) << 37 if name[0] == "R" else source.byte() << 44))
    elif what < 104:
        start, end = extent(source)
        try:
            vm.unmap(start, end, PARTIALS[what % 3])
        except MemoryError:
            pass
    elif what < 110:
        start, end = extent(source)
        try:
            vm.host.map(start, start + HOST + (source.byte() & 3) * (PAGE << 9), end - start, HOST_PERMS[what - 104])
        except MemoryError:
            pass
    elif what < 114:
        start, end = extent(source)
        vm.host.protect(start, end, HOST_PERMS[source.byte() % len(HOST_PERMS)])
    elif what < 118:
        start, end = extent(source)
        try:
            vm.log_dirty(start, end, bool(what & 1))
        except MemoryError:
            pass
    elif what < 121:
        vm.dirty_log(*extent(source))
    elif what < 124:
        (vm.age if what & 1 else vm.test_young)(*extent(source))
    elif what < 126:
        assert vcpu.translate(ipa(source), 1).kind in (s2.HIT, s2.MISS)
        vm.reverse(address(source) & (1 << 48) - 1)
    else:
        vm.take_tlbis(source.byte() if what & 1 else None)


def extent(source: Input) -> tuple[int, int]:
    start = RAM + source.byte() % (PAGES + 8) * PAGE
    length = source.byte()
    return start, start + (1 + length % 16) * PAGE if length < 0xF0 else start + (PAGE << 9)


def fault(vcpu: s2.VCPU, at: int, access: int) -> None:
    try:
        found = vcpu.fault(at, access)
    except MemoryError:
        return
    assert found.kind in (*KINDS, s2.RETRY), found
    if found.kind in (s2.HIT, s2.MAPPED):
        assert vcpu.translate(at, access & 7).kind == s2.HIT or access & ~7


def isolated(vm: s2.NestedVM) -> None:
    """Every leaf of every shadow lies inside what the host maps now, and allows no more."""
    vm.check()
    host = vm.host.leaves()
    starts, ends = host["cipa"], host["cipa"] + host["size"]
    for context in vm.contexts:
        for row in vm.shadow(context.index):
            cipa, to, pa = int(row["cipa"]), int(row["cipa"] + row["size"]), int(row["pa"])
            while cipa < to:
                at = int(np.searchsorted(starts, cipa, side="right")) - 1
                assert at >= 0 and cipa < ends[at], f"{cipa:#x} of a shadow is not the host's"
                own = host[at]
                assert pa == int(own["pa"]) + cipa - int(own["cipa"]), f"{cipa:#x} leads to {pa:#x}"
                assert not int(row["perm"]) & ~int(own["perm"]), f"{cipa:#x} allows {row['perm']}, not {own['perm']}"
                pa, cipa = pa + int(ends[at]) - cipa, int(ends[at])


TARGETS: dict[str, Callable[[bytes], None]] = {
    "walker": walker, "tlbi": tlbi, "trace": trace, "capture": capture, "dump": dump, "engine": engine}
