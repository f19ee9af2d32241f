"""Trace import: ns per line of text and CSV, plain and packed. The floor is to read and split the same lines.

Text is a mix as a host with kprobes writes it, a third of it events that become no rows.
"""

import gzip
import io
import lzma
from itertools import cycle, islice
from time import perf_counter

import numpy as np
import pytest

from s2shadow.trace import read_trace

LINES = 100_000
BODIES = (
    "kvm_guest_fault: ipa {ipa:#x}, hsr 0x92000047, hxfar {va:#08x}, pc {pc:#016x}",
    "map: (kvm_pgtable_stage2_map+0x0/0x138) pgd=0x10502e000 ipa={ipa:#x} size=0x1000 pa={pa:#x} prot=0xf",
    "kvm_entry: PC: 0x{pc:016x}",
    "kvm_exit: TRAP: HSR_EC: 0x0024 (DABT_LOW), PC: 0x{pc:016x}",
    "mn_start: (kvm_mmu_notifier_invalidate_range_start+0x0/0x3a0) start={va:#x} end={pc:#x} event=1",
    "mn_end: (kvm_mmu_notifier_invalidate_range_end+0x0/0x3a0) start={va:#x} end={pc:#x}",
    "sched_switch: prev_comm=qemu-system-aar prev_pid=150 prev_prio=120 prev_state=S ==> next_comm=swapper/1",
    "age: (kvm_pgtable_stage2_test_clear_young+0x0/0xa0) pgd=0x10502e000 ipa={ipa:#x} size=0x1000 mkold=1",
    "kvm_age_hva: mmu notifier age hva: {va:#016x} -- {pc:#016x}",
)
ROWS = (
    "TLBI,ipas2e1is,d50c8021,{xt:x},0,100010502e001,802d3558,80000001",
    "TLBI,vmalle1is,d508831f,0,0,100010502e001,802d3558,80000001",
    "ENTRY,,d69f03e0,0,0,100010502e001,802d3558,2403c807d623f",
    "VTTBR,,d51c2113,{xt:x},0,100010502e001,802d3558,80000001",
)


def text_lines():
    numbers = np.random.default_rng(1)
    for at, body in enumerate(islice(cycle(BODIES), LINES)):
        ipa, va, pc, pa = (int(value) for value in numbers.integers(1 << 12, 1 << 44, 4))
        cpu = at & 3
        yield (f"       CPU {cpu}/KVM-{150 + cpu:<7} [{cpu:03d}] d..1. {10 + at // 10**6:5d}.{at % 10**6:06d}: "
               + body.format(ipa=ipa & ~0xFFF, va=va, pc=pc, pa=pa & ~0xFFF) + "\n")


def csv_lines():
    numbers = np.random.default_rng(2)
    yield "seq,us,vcpu,el,event,op,insn,xt,x1,vttbr_el2,vtcr_el2,hcr_el2\n"
    for at, row in enumerate(islice(cycle(ROWS), LINES - 1)):
        yield f"{at},{at * 13},{at & 1},2,{row.format(xt=int(numbers.integers(1 << 48)))}\n"


@pytest.fixture(scope="module")
def text():
    return "".join(text_lines()).encode()


@pytest.fixture(scope="module")
def table():
    return "".join(csv_lines()).encode()


def import_of(report, data, rows, unpack=bytes):
    """``data`` from memory, since the page cache holds a trace that was just recorded."""

    def run():
        assert sum(map(len, read_trace(io.BytesIO(data)))) == rows

    report(run, operations=LINES)
    benchmark = report.benchmark
    if benchmark.stats is not None:
        floor = split_ns(data, unpack)
        ratio = benchmark.extra_info["ns_per_operation"] / floor
        benchmark.extra_info.update(floor_ns=round(floor, 3), times_floor=round(ratio, 3),
                                    lines_per_s=round(1e9 / benchmark.extra_info["ns_per_operation"]))


def split_ns(data, unpack):
    times = []
    for _ in range(5):
        began = perf_counter()
        lines = unpack(data).split(b"\n")
        times.append(perf_counter() - began)
        assert len(lines) == LINES + 1
        del lines
    return min(times) * 1e9 / LINES


def used(text):
    names = (b"kvm_guest_fault", b"map", b"kvm_exit", b"mn_start", b"mn_end", b"age", b"kvm_age_hva")
    return sum(text.count(b": " + name + b": ") for name in names)


def bench_trace_text(report, text):
    import_of(report, text, used(text))


def bench_trace_text_gzip(report, text):
    import_of(report, gzip.compress(text), used(text), gzip.decompress)


def bench_trace_text_xz(report, text):
    import_of(report, lzma.compress(text, preset=1), used(text), lzma.decompress)


def bench_trace_csv(report, table):
    import_of(report, table, LINES - 1)
