"""Trace import: every event in every tool's way of writing it, random lines, captures against a slow reader."""

import json
import lzma
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import s2shadow as s2
import traceline
from s2shadow.events import EVENT_DTYPE, UNKNOWN, EventKind, fault_access
from s2shadow.trace import TraceError, VMNumbers, read_trace, tlbi_ops
from s2shadow.tracelines import shapes
from traceline import CSV_HEADER as HEADER
from traceline import UNSET, fields, read

HERE = Path(__file__).parent
SAMPLES = HERE / "data" / "traces"
CAPTURES = os.environ.get("S2SHADOW_CAPTURES")
K = EventKind


def one(line, **options):
    rows, reader = read(line + "\n", **options)
    assert len(rows) == 1 and reader.unreadable == 0
    return fields(rows[0])


# --- what stands before an event ---------------------------------------------------------------------------------

BODY = "kvm_access_fault: IPA: 40085000"
PERF = f"kvm:{BODY}"
AT = {"kind": K.ACCESS_FAULT, "start": 0x40085000, "end": 0x40085000, "seq": 1}
QEMU = AT | {"pid": 24899, "cpu": 3, "vcpu": 0, "time": 1_234_567_890_000}

HEADS = {
    "ftrace": (f"       CPU 0/KVM-24899   [003] d..1.  1234.567890: {BODY}", QEMU),
    "ftrace, no flag set": (f"       CPU 0/KVM-24899   [003] .....  1234.567890: {BODY}", QEMU),
    "ftrace, four flags": (f"       CPU 0/KVM-24899   [003] d..1  1234.567890: {BODY}", QEMU),
    "ftrace, letters and digits": (f"       CPU 0/KVM-24899   [003] dNZ12  1234.567890: {BODY}", QEMU),
    "ftrace, flags off": (f"       CPU 0/KVM-24899   [003]  1234.567890: {BODY}", QEMU),
    "ftrace, process": (f"       CPU 0/KVM-24899   (  24890) [003] d..1.  1234.567890: {BODY}", QEMU | {"tgid": 24890}),
    "ftrace, process unknown": (f"       CPU 0/KVM-24899   (-------) [003] d..1.  1234.567890: {BODY}", QEMU),
    "trace-cmd": (f"       CPU 0/KVM-24899 [003]  1234.567890: {'kvm_access_fault: ':22}IPA: 40085000", QEMU),
    "trace-cmd with flags": (f"       CPU 0/KVM-24899 [003] d..1.  1234.567890: {'kvm_access_fault: ':22}IPA: 40085000",
                             QEMU),
    "trace-cmd -t": (f"       CPU 0/KVM-24899 [003]  1234.567890123: {BODY}", QEMU | {"time": 1_234_567_890_123}),
    "trace-cmd, several files": (f"host:       CPU 0/KVM-24899 [003]  1234.567890: {BODY}", QEMU),
    "perf": (f"       CPU 0/KVM 24899 [003]  1234.567890:      {PERF}", QEMU),
    "perf, process": (f"       CPU 0/KVM 24890/24899 [003]  1234.567890:      {PERF}", QEMU | {"tgid": 24890}),
    "perf --ns": (f"       CPU 0/KVM 24899 [003]  1234.567890123: {PERF}", QEMU | {"time": 1_234_567_890_123}),
    "perf with the period": (f"       CPU 0/KVM 24899 [003]  1234.567890:          1 {PERF}", QEMU),
    "perf, a probe in a group": (f"  CPU 0/KVM 24899 [003]  1234.567890: my-probes:{BODY}", QEMU),
    "no blanks in front": (f"CPU 0/KVM-24899 [003] d..1. 1234.567890: {BODY}", QEMU),
    "tabs": (f"\tCPU 0/KVM-24899\t[003]\td..1.\t1234.567890:\t{BODY}", QEMU),
    "carriage return": (f"       CPU 0/KVM-24899   [003] d..1.  1234.567890: {BODY}\r", QEMU),
    "ticks": (f"       CPU 0/KVM-24899   [003] d..1. 98765432109876: {BODY}", QEMU | {"time": 98765432109876}),
    "wide CPU": (f"       CPU 0/KVM-24899   [1023] d..1.  1234.567890: {BODY}", QEMU | {"cpu": 1023}),
    "long up": (f"       CPU 0/KVM-24899   [003] d..1. 1700000000.000001: {BODY}",
                QEMU | {"time": 1_700_000_000_000_001_000}),
    "tenth vCPU": (f"      CPU 10/KVM-24899   [003] d..1.  1234.567890: {BODY}", QEMU | {"vcpu": 10}),
    "crosvm": (f"    crosvm_vcpu7-24899   [003] d..1.  1234.567890: {BODY}", QEMU | {"vcpu": 7}),
    "firecracker": (f"       fc_vcpu 2-24899   [003] d..1.  1234.567890: {BODY}", QEMU | {"vcpu": 2}),
    "other names": (f" qemu-system-aar-24899   [003] d..1.  1234.567890: {BODY}", QEMU | {"vcpu": UNKNOWN}),
    "unknown name": (f"           <...>-24899   [003] d..1.  1234.567890: {BODY}", QEMU | {"vcpu": UNKNOWN}),
    "dots and digits": (f"       kdamond.0-55      [001] d..2.    10.065443: {BODY}",
                        AT | {"pid": 55, "cpu": 1, "time": 10_065_443_000}),
    "colons": (f"  kworker/0:1-ev-77      [000] d..2.    10.065443: {BODY}", AT | {"pid": 77, "time": 10_065_443_000}),
    "a comm like a head": (f"   x-1 [001] 2-77      [000] d..2.    10.065443: {BODY}",
                           AT | {"pid": 77, "time": 10_065_443_000}),
    "brackets": (f"        [kthread]-77      [000] d..2.    10.065443: {BODY}",
                 AT | {"pid": 77, "time": 10_065_443_000}),
    "perf, dash and number": (f"      vhost-24890 24899 [003]  1234.567890: {PERF}", QEMU | {"vcpu": UNKNOWN}),
    "bytes of no text": ("       CPU 0/KVM\udcff-24899   [003] d..1.  1234.567890: " + BODY, QEMU),
    "idle": (f"          <idle>-0       [000] d.h2.     0.000001: {BODY}", AT | {"time": 1000}),
}


@pytest.mark.parametrize("case", HEADS)
def test_heads(case):
    line, expected = HEADS[case]
    expected = {name: value for name, value in expected.items() if value != UNSET[name]}
    rows, reader = read(line.encode(errors="surrogateescape") + b"\n")
    assert reader.unreadable == 0 and len(rows) == 1
    assert fields(rows[0]) == expected


# --- what an event says ------------------------------------------------------------------------------------------

PROBE = "(kvm_pgtable_stage2_map+0x0/0x138)"
R, W, X, P = s2.READ, s2.WRITE, s2.EXEC, s2.PTW

BODIES = {
    "guest fault": ("kvm_guest_fault: ipa 0x40085000, hsr 0x92000007, hxfar 0x40085978, pc 0x00000040085978",
                    {"start": 0x40085000, "value": 0x92000007, "va": 0x40085978, "pc": 0x40085978, "access": R}),
    "zeros of the kernel": ("kvm_guest_fault: ipa 0x0, hsr 0x82000005, hxfar 0x000000, pc 0x00000000000000",
                            {"value": 0x82000005, "access": X}),
    "zeros of user space": ("kvm_guest_fault: ipa 0, hsr 0x82000005, hxfar 00000000, pc 0000000000000000",
                            {"value": 0x82000005, "access": X}),
    "esr for hsr": ("kvm_guest_fault: ipa 0x40085000, esr 0x93c28046, hxfar 0x9000000, pc 0x00000000000874",
                    {"start": 0x40085000, "value": 0x93C28046, "va": 0x9000000, "pc": 0x874, "access": W}),
    "32-bit arm": ("kvm_guest_fault: ipa 0x1c090000, hsr 0x93c08007, hxfar 0xfee09000, pc 0x80100a4c",
                   {"start": 0x1C090000, "value": 0x93C08007, "va": 0xFEE09000, "pc": 0x80100A4C, "access": R}),
    "all 64 bits": ("kvm_guest_fault: ipa 0xfffffffff000, hsr 0x92000087, hxfar 0xffffffffffffffff, "
                    "pc 0xffffffc008010000",
                    {"start": 0xFFFFFFFFF000, "value": 0x92000087, "va": (1 << 64) - 1, "pc": 0xFFFFFFC008010000,
                     "access": R | P}),
    "access fault": ("kvm_access_fault: IPA: 0", {}),
    "unmap": ("kvm_unmap_hva_range: mmu notifier unmap range: 0x00ffff8c000000 -- 0x00ffff8c200000",
              {"start": 0xFFFF8C000000, "end": 0xFFFF8C200000}),
    "unmap from zero": ("kvm_unmap_hva_range: mmu notifier unmap range: 0000000000000000 -- 0x00ffff8c200000",
                        {"end": 0xFFFF8C200000}),
    "age": ("kvm_age_hva: mmu notifier age hva: 0x00ffff96200000 -- 0x00ffff96400000",
            {"start": 0xFFFF96200000, "end": 0xFFFF96400000}),
    "age, fast": ("kvm_age_hva: mmu notifier age hva: 0x00ffff96200000 -- 0x00ffff96400000 fast_only: 1",
                  {"start": 0xFFFF96200000, "end": 0xFFFF96400000}),
    "test age": ("kvm_test_age_hva: mmu notifier test age hva: 0x00ffff96200000",
                 {"start": 0xFFFF96200000, "end": 0xFFFF96200000}),
    "exit": ("kvm_exit: TRAP: HSR_EC: 0x0024 (DABT_LOW), PC: 0x00000000426ffa74",
             {"flags": 2, "value": 0x24, "pc": 0x426FFA74}),
    "exit, interrupt": ("kvm_exit: IRQ: HSR_EC: 0x0000 (UNKNOWN), PC: 0x00000000426ff268", {"pc": 0x426FF268}),
    "exit, zero PC": ("kvm_exit: SERROR: HSR_EC: 0x0000 (UNKNOWN), PC: 0000000000000000", {"flags": 1}),
    "exit, new reason": ("kvm_exit: HYP_GONE: HSR_EC: 0x0000 (UNKNOWN), PC: 0x10", {"flags": 3, "pc": 0x10}),
    "system register": ("kvm_sys_access: PC: ffff800080012340 SYS_ICC_SGI1R_EL1 (3,0,12,11,5) write",
                        {"pc": 0xFFFF800080012340, "flags": 1, "insn": 0xD518CBA0}),
    "register read": ("kvm_sys_access: PC: 0 VTTBR_EL2 (3,4,2,1,0) read", {"insn": 0xD53C2100}),
    "TLBI in a trap": ("kvm_sys_access: PC: ffff8000801dd2f0 TLBI_IPAS2E1IS (1,4,8,0,1) write",
                       {"pc": 0xFFFF8000801DD2F0, "flags": 1, "insn": 0xD50C8020}),
    "nested eret": ("kvm_nested_eret: elr_el2: 0x426ff150 spsr_el2: 0x000003c5 (M: EL1h) hcr_el2: 30480000000",
                    {"pc": 0x426FF150, "value": 0x3C5, "hcr": 0x30480000000}),
    "nested eret, mode without name": ("kvm_nested_eret: elr_el2: 0x426ff150 spsr_el2: 0x000003c3 (M: ) hcr_el2: 0",
                                       {"pc": 0x426FF150, "value": 0x3C3}),
    "nested exception": ("kvm_inject_nested_exception: SYNC: esr_el2 0x5a000000 elr_el2: 0xffffd0308b240eb0 "
                         "spsr_el2: 0x600003c5 (M: EL1h) hcr_el2: 30480000000",
                         {"pc": 0xFFFFD0308B240EB0, "value": 0x5A000000, "hcr": 0x30480000000}),
    "nested interrupt": ("kvm_inject_nested_exception: IRQ: esr_el2 0x0 elr_el2: 0x10 spsr_el2: 0x3c5 (M: EL1h) "
                         "hcr_el2: 1",
                         {"pc": 0x10, "hcr": 1, "flags": 1}),
    "map": (f"map: {PROBE} pgd=0x111a0e000 ipa=0x0 size=0x1000 pa=0x111ef8000 prot=0xf",
            {"root": 0x111A0E000, "end": 0x1000, "pa": 0x111EF8000, "value": 0xF, "access": R | W | X | s2.EXEC_EL0}),
    "map in perf": ("map: (ffff8000800b1234) pgd=0x111a0e000 ipa=0x200000 size=0x200000 pa=0x111e00000 prot=0xc",
                    {"root": 0x111A0E000, "start": 0x200000, "end": 0x400000, "pa": 0x111E00000, "value": 0xC,
                     "access": R | W}),
    "map, software bits": (f"map: {PROBE} pgd=0x1000 ipa=0x1000 size=0x1000 pa=0x0 prot=0x180000000000009",
                           {"root": 0x1000, "start": 0x1000, "end": 0x2000, "value": 0x180000000000009,
                            "access": R | X}),
    "unmap table": (f"unmap: {PROBE} pgd=0x150fc6000 ipa=0x800000200000 size=0x200000",
                    {"root": 0x150FC6000, "start": 0x800000200000, "end": 0x800000400000}),
    "past the end": (f"unmap: {PROBE} pgd=0x1000 ipa=0xfffffffffffff000 size=0x2000",
                     {"root": 0x1000, "start": 0xFFFFFFFFFFFFF000, "end": (1 << 64) - 1}),
    "wrprotect": (f"wrprotect: {PROBE} pgd=0x14522a000 ipa=0x10000000 size=0x4000000",
                  {"root": 0x14522A000, "start": 0x10000000, "end": 0x14000000}),
    "relax": (f"relax: {PROBE} pgd=0x150fc6000 ipa=0x11fcf000 prot=0xa",
              {"root": 0x150FC6000, "start": 0x11FCF000, "end": 0x11FCF000, "value": 0xA, "access": R | s2.EXEC_EL0}),
    "mkyoung": (f"mkyoung: {PROBE} pgd=0x50459000 ipa=0x1000c000",
                {"root": 0x50459000, "start": 0x1000C000, "end": 0x1000C000}),
    "clear young": (f"age: {PROBE} pgd=0x113640000 ipa=0x50600000 size=0x200000 mkold=1",
                    {"root": 0x113640000, "start": 0x50600000, "end": 0x50800000, "flags": 1}),
    "test young": (f"age: {PROBE} pgd=0x113640000 ipa=0x50600000 size=0x1000 mkold=0",
                   {"root": 0x113640000, "start": 0x50600000, "end": 0x50601000}),
    "split": (f"split: {PROBE} pgd=0x14522a000 ipa=0x10200000 size=0x200000",
              {"root": 0x14522A000, "start": 0x10200000, "end": 0x10400000}),
    "destroy": (f"destroy: {PROBE} pgd=0x0", {}),
    "gfn_unmap": (f"gfn_unmap: {PROBE} start=0x7c000 end=0x7c200", {"start": 0x7C000000, "end": 0x7C200000}),
    "mn_start": (f"mn_start: {PROBE} start=0xffffa8c00000 end=0xffffa8e00000 event=3",
                 {"start": 0xFFFFA8C00000, "end": 0xFFFFA8E00000, "value": 3}),
    "mn_end": (f"mn_end: {PROBE} start=0xffffa8c00000 end=0xffffa8e00000",
               {"start": 0xFFFFA8C00000, "end": 0xFFFFA8E00000}),
    "memslot": (f"memslot: {PROBE} slot=0x2 flags=0x3 gpa=0x40000000 size=0x40000000 hva=0xffff57e00000",
                {"start": 0x40000000, "end": 0x80000000, "va": 0xFFFF57E00000, "value": 2, "flags": 3}),
    "tlb_ipa": (f"tlb_ipa: {PROBE} pgd=0x14522a000 ipa=0x40000000 level=2",
                {"root": 0x14522A000, "start": 0x40000000, "end": 0x40000000, "level": 2}),
    "tlb_ipa, any level": (f"tlb_ipa: {PROBE} pgd=0x447d9000 ipa=0x0 level=2147483647",
                           {"root": 0x447D9000, "level": -2}),
    "tlb_ipa, level -1": (f"tlb_ipa: {PROBE} pgd=0x447d9000 ipa=0x0 level=-1", {"root": 0x447D9000, "level": -1}),
    "tlb_ipa_nsh": (f"tlb_ipa_nsh: {PROBE} pgd=0x150fc6000 ipa=0x11fcf000 level=3",
                    {"root": 0x150FC6000, "start": 0x11FCF000, "end": 0x11FCF000, "level": 3}),
    "tlb_range": (f"tlb_range: {PROBE} pgd=0x111a0e000 start=0x10000000 pages=8192",
                  {"root": 0x111A0E000, "start": 0x10000000, "end": 0x12000000}),
    "tlb_range, in hexadecimal": (f"tlb_range: {PROBE} pgd=0x111a0e000 start=0x10000000 pages=0x200",
                                  {"root": 0x111A0E000, "start": 0x10000000, "end": 0x10200000}),
    "tlb_range, absurd": (f"tlb_range: {PROBE} pgd=0x1000 start=0x0 pages=9999999999999999999",
                          {"root": 0x1000, "end": 1 << 52}),
    "tlb_vmid": (f"tlb_vmid: {PROBE} pgd=0x447da000", {"root": 0x447DA000}),
    "tlb_cpu": (f"tlb_cpu: {PROBE} pgd=0x111a0e000", {"root": 0x111A0E000}),
    "tlb_allvm": (f"tlb_allvm: {PROBE}", {}),
    "nested_unmap": (f"nested_unmap: {PROBE} may_block=1", {"flags": 1}),
    "nested_wp": (f"nested_wp: {PROBE}", {}),
    "nested_flush": (f"nested_flush: {PROBE}", {}),
    "shadow_unmap_range": (f"shadow_unmap_range: {PROBE} pgd=0x447da000", {"root": 0x447DA000}),
    "shadow_unmap_ipa": (f"shadow_unmap_ipa: {PROBE} pgd=0x447da000", {"root": 0x447DA000}),
    "shadow_tlbi_s1e1": (f"shadow_tlbi_s1e1: {PROBE} pgd=0x447da000", {"root": 0x447DA000}),
    "shadow_lookup": (f"shadow_lookup: {PROBE}", {}),
    "walk_nested": (f"walk_nested: {PROBE} ipa=0x9000000", {"start": 0x9000000, "end": 0x9000000}),
    "s2_fault_inject": (f"s2_fault_inject: {PROBE} esr=0x93c28046", {"value": 0x93C28046}),
    "h_ipas2e1is": (f"h_ipas2e1is: {PROBE} op1=4 crm=0 op2=1 val=0x600000043fcf",
                    {"insn": 0xD50C8020, "value": 0x600000043FCF}),
    "h_ipas2e1is, for IPAS2E1": (f"h_ipas2e1is: {PROBE} op1=4 crm=4 op2=1 val=0x1", {"insn": 0xD50C8420, "value": 1}),
    "h_ripas2e1is": (f"h_ripas2e1is: {PROBE} op1=4 crm=0 op2=2 val=0x600000010000",
                     {"insn": 0xD50C8040, "value": 0x600000010000}),
    "h_vmalls12e1is": (f"h_vmalls12e1is: {PROBE} op1=4 crm=3 op2=6", {"insn": 0xD50C83C0}),
    "h_alle1is": (f"h_alle1is: {PROBE} op1=4 crm=3 op2=4", {"insn": 0xD50C8380}),
    "h_tlbi_el1": (f"h_tlbi_el1: {PROBE} op1=0 crm=3 op2=0 val=0x0", {"insn": 0xD5088300}),
    "h_tlbi_el2": (f"h_tlbi_el2: {PROBE} op1=4 crm=3 op2=1 val=0x10", {"insn": 0xD50C8320, "value": 0x10}),
    "mark": ("tracing_mark_write: SCN snap booting", {}),
}
TOOLS = {
    "ftrace": lambda name, text: f"       CPU 1/KVM-150     [001] d..1.    11.052636: {name}: {text}",
    "trace-cmd": lambda name, text: f"       CPU 1/KVM-150   [001]    11.052636: {name + ': ':<22}{text}",
    "perf": lambda name, text: f"       CPU 1/KVM   150 [001]    11.052636: {'s2:' + name:>28}: {text}",
}
HEAD = {"pid": 150, "cpu": 1, "vcpu": 1, "time": 11_052_636_000, "seq": 1}


@pytest.mark.parametrize("case", BODIES)
def test_bodies(case):
    line, said = BODIES[case]
    name, text = line.split(": ", 1)
    for line_of in TOOLS.values():
        found = one(line_of(name, text))
        assert found.pop("kind") == traceline.KINDS[name]
        assert found == HEAD | ({"end": said["start"]} if "start" in said else {}) | said


def test_the_table_of_bodies_has_every_event():
    assert {line.split(":")[0] for line, _ in BODIES.values()} | {"print"} == {
        name.decode() for name in shapes(4096)}


def test_instruction_words_decode():
    """The words that are put together from operands are those of the operations."""
    for case, name in (("h_ipas2e1is", "IPAS2E1IS"), ("h_ripas2e1is", "RIPAS2E1IS"), ("h_alle1is", "ALLE1IS"),
                       ("h_vmalls12e1is", "VMALLS12E1IS"), ("TLBI in a trap", "IPAS2E1IS"), ("h_tlbi_el1", "VMALLE1IS"),
                       ("h_tlbi_el2", "VAE2IS"), ("h_ipas2e1is, for IPAS2E1", "IPAS2E1")):
        assert s2.decode_tlbi(BODIES[case][1]["insn"]).name == name


def test_page_size_of_the_host():
    line = TOOLS["ftrace"]("tlb_range", f"{PROBE} pgd=0x1000 start=0x10000 pages=3")
    assert one(line, page=65536)["end"] == 0x40000
    assert one(TOOLS["ftrace"]("gfn_unmap", f"{PROBE} start=0x1 end=0x2"), page=16384)["end"] == 0x8000


def test_notes():
    text = "".join(TOOLS[tool](name, f"{before}mark {at} of {tool}") + "\n" for at, (tool, name, before) in enumerate((
        ("ftrace", "tracing_mark_write", ""), ("trace-cmd", "print", "tracing_mark_write: "),
        ("perf", "print", "tracing_mark_write: "))))
    rows, reader = read(text + TOOLS["ftrace"]("tracing_mark_write", "") + "\n")
    assert rows["kind"].tolist() == [K.NOTE] * 4 and rows["value"].tolist() == [0, 1, 2, 3]
    assert [note.text for note in reader.notes] == ["mark 0 of ftrace", "mark 1 of trace-cmd", "mark 2 of perf", ""]
    assert {note.time for note in reader.notes} == {11_052_636_000}


def test_fault_access():
    """As KVM decides: exec for instruction aborts, write by WnR, a stage-1 walk is a write if it lacked permission."""
    abort = {"data": 0x24 << 26, "fetch": 0x20 << 26, "same EL": 0x25 << 26}
    wnr, s1ptw, permission, translation = 1 << 6, 1 << 7, 0x0F, 0x07
    cases = [(abort["data"] | translation, R), (abort["data"] | wnr | permission, W), (abort["fetch"] | permission, X),
             (abort["data"] | s1ptw | translation, R | P), (abort["data"] | s1ptw | wnr | translation, R | P),
             (abort["data"] | s1ptw | permission, W | P), (abort["fetch"] | s1ptw | translation, R | P),
             (abort["same EL"] | wnr | translation, W), (0x18 << 26 | wnr, 0), (0, 0)]
    assert fault_access(np.array([esr for esr, _ in cases], np.uint64)).tolist() == [access for _, access in cases]


# --- lines that are no events ------------------------------------------------------------------------------------

EVENT = TOOLS["ftrace"]("tlb_allvm", PROBE)
NOT_COUNTED = ["", "   ", "# tracer: nop", "#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION", "cpus=8",
               "version = 7", "CPU 3 is empty", "##### CPU 2 buffer started ####", " => kvm_handle_guest_abort",
               " => 0xffff8000", "           CPU 1/KVM-150     [001] .....    11.052636: <stack trace>",
               "\tffff8000800b1234 kvm_handle_guest_abort+0x14 ([kernel.kallsyms])"]
UNREADABLE = {
    "prose": "there is nothing here",
    "known event, other words": TOOLS["ftrace"]("kvm_guest_fault", "ipa=0x40085000 hsr=0x92000007"),
    "a field too few": TOOLS["ftrace"]("kvm_guest_fault", "ipa 0x40085000, hsr 0x92000007, hxfar 0x40085978"),
    "17 digits": TOOLS["ftrace"]("kvm_access_fault", "IPA: 10000000000000000"),
    "0x alone": TOOLS["ftrace"]("map", f"{PROBE} pgd=0x ipa=0x0 size=0x1000 pa=0x0 prot=0xf"),
    "digits and letters": TOOLS["ftrace"]("tlb_cpu", f"{PROBE} pgd=0x1000zz"),
    "decimal with letters": TOOLS["ftrace"]("tlb_cpu", f"{PROBE} pgd=10f0"),
    "20 digits": TOOLS["ftrace"]("tlb_range", f"{PROBE} pgd=0x0 start=0x0 pages=10000000000000000000"),
    "probe left open": TOOLS["ftrace"]("tlb_allvm", "(kvm_flush"),
    "cut inside the head": "       CPU 0/KVM-24899   [003] d..1.  1234.5678",
    "cut before the event": "       CPU 0/KVM-24899   [003] d..1.  1234.567890: ",
    "no CPU": "       CPU 0/KVM-24899   1234.567890: kvm_access_fault: IPA: 0",
    "no task": "   [003] d..1.  1234.567890: kvm_access_fault: IPA: 0",
    "task without a number": "   CPU 0/KVM [003] d..1.  1234.567890: kvm_access_fault: IPA: 0",
    "number too long": "       CPU 0/KVM-9999999999   [003] d..1.  1234.567890: kvm_access_fault: IPA: 0",
    "seconds too long": "       CPU 0/KVM-24899   [003] d..1. 12345678901.567890: kvm_access_fault: IPA: 0",
    "function tracer": "       CPU 0/KVM-24899   [003] d..1.  1234.567890: kvm_vcpu_load <-kvm_arch_vcpu_ioctl_run",
    "NUL": "\0\0\0\0[\0]",
}


@pytest.mark.parametrize("line", NOT_COUNTED)
def test_comments_and_stacks_are_passed_over(line):
    rows, reader = read(f"{line}\n{EVENT}\n")
    assert len(rows) == 1 and reader.unreadable == 0 and reader.lines == 2 and rows["seq"][0] == 2


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_lines_are_counted_and_kept(case):
    rows, reader = read(f"{EVENT}\n{UNREADABLE[case]}\n{EVENT}\n")
    assert rows["seq"].tolist() == [1, 3] and reader.unreadable == 1
    assert reader.unreadable_lines == [(2, UNREADABLE[case].strip())]


def test_only_the_first_unreadable_lines_are_kept():
    rows, reader = read("nonsense\n" * 25 + f"{EVENT}\n")
    assert len(rows) == 1 and reader.unreadable == 25 and reader.lines == 26
    assert reader.unreadable_lines == [(line, "nonsense") for line in range(1, 11)]


def test_lost_events():
    lines = ["# entries-in-buffer/entries-written: 1000/1234   #P:2", "CPU:2 [LOST 77 EVENTS]", EVENT,
             "CPU:3 [5 EVENTS DROPPED]", "  swapper 0 [000] 11.052636: PERF_RECORD_LOST lost 9"]
    rows, reader = read("\n".join(lines))
    assert len(rows) == 1 and reader.lost == 234 + 77 + 5 + 9 and reader.unreadable == 0


def test_what_a_comment_says_was_left_out():
    comment = "# 524272 unmap lines of size=0x40000000 left out above"
    rows, reader = read(f"{EVENT}\n{comment}\n{EVENT}\n# 12 sheep left out\n")
    assert len(rows) == 2 and reader.unreadable == 0 and reader.left_out == [(2, "unmap", 524272)]


def test_other_events_are_counted():
    text = "".join(TOOLS[tool](name, "VCPU: 1") + "\n" for tool, name in (
        ("ftrace", "kvm_entry"), ("perf", "kvm_entry"), ("trace-cmd", "sched_switch"))) + f"{EVENT}\n"
    rows, reader = read(text)
    assert len(rows) == 1 and reader.unreadable == 0
    assert reader.events == {"kvm_entry": 2, "sched_switch": 1, "tlb_allvm": 1}
    assert reader.unused == {"kvm_entry": 2, "sched_switch": 1}


def test_a_trace_without_a_single_useful_event_is_still_a_trace():
    rows, reader = read(TOOLS["ftrace"]("kvm_entry", "PC: 0x0") + "\n")
    assert len(rows) == 0 and reader.unused == {"kvm_entry": 1}


def test_a_flood_of_names_stays_bounded():
    rows, reader = read("".join(TOOLS["ftrace"](f"event_{at}", "") + "\n" for at in range(6000)) + f"{EVENT}\n" * 3)
    assert len(rows) == 3 and len(reader.events) <= 4097
    assert sum(reader.events.values()) == 6003 and reader.events["(other)"] > 1900


def test_out_of_order():
    times = [5, 7, 6, 6, 9, 1]
    text = "".join(f" x-1 [000] ..... {seconds}.000000: tlb_allvm: {PROBE}\n" for seconds in times)
    for chunk in (1, 2, 100):
        rows, reader = read(text, chunk=chunk)
        assert (rows["time"] // 10**9).tolist() == times and reader.out_of_order == 2


# --- CSV ---------------------------------------------------------------------------------------------------------

ROW = "320269,165030671,1,2,TLBI,ipas2e1is,d50c8021,600000043fcf,3,10001041f8001,802d3558,2773c827d223f"
ROW_SAYS = {"seq": 320269, "time": 165_030_671_000, "cpu": 1, "vcpu": 1, "el": 2, "kind": K.TLBI, "insn": 0xD50C8021,
            "value": 0x600000043FCF, "start": 3, "end": 3, "vttbr": 0x10001041F8001, "vtcr": 0x802D3558,
            "hcr": 0x2773C827D223F}


def test_csv_row():
    rows, reader = read(f"{HEADER}\n{ROW}\n")
    assert reader.format == "csv" and reader.lines == 2 and reader.unreadable == 0
    assert [fields(row) for row in rows] == [ROW_SAYS]


@pytest.mark.parametrize("text", [ROW, f"# comment\n\n{HEADER}\r\n{ROW}\r\n", f"\ufeff{HEADER}\n{ROW}",
                                  f"{HEADER}\n" + ROW.replace("d50c8021", "0xD50C8021").replace("802d35", "0x802D35"),
                                  f"{HEADER}\n{HEADER}\n{ROW}\n"])
def test_csv_variants(text):
    rows, reader = read(text)
    assert [fields(row) for row in rows] == [ROW_SAYS] and reader.unreadable == 0


def test_csv_columns_in_any_order():
    names = HEADER.split(",")
    values = dict(zip(names, ROW.split(","), strict=True))
    kept = [name for name in reversed(names) if name not in ("seq", "op", "x1")]
    text = ",".join([*kept, "comment"]) + "\n" + ",".join([*(values[name] for name in kept), "what I saw"]) + "\n"
    rows, _ = read(text)
    expected = {name: value for name, value in ROW_SAYS.items() if name not in ("start", "end")} | {"seq": 2}
    assert [fields(row) for row in rows] == [expected]


@pytest.mark.parametrize(("column", "value"), [
    ("us", "-1"), ("us", ""), ("vcpu", "70000"), ("el", "4"), ("event", "NOISE"), ("insn", "1d50c8021"), ("xt", "0x"),
    ("xt", "11112222333344445"), ("vttbr_el2", "1g"), ("hcr_el2", ""), ("hcr_el2", "1,2")])
def test_csv_rows_that_cannot_be(column, value):
    bad = ROW.split(",")
    bad[HEADER.split(",").index(column)] = value
    rows, reader = read(f"{HEADER}\n{ROW}\n{','.join(bad)}\n{ROW}\n")
    assert [fields(row) for row in rows] == [ROW_SAYS] * 2
    assert reader.unreadable_lines == [(3, ",".join(bad))]


@pytest.mark.parametrize(("header", "error"), [
    (HEADER.replace("vttbr_el2", "vttbr"), "has no column vttbr_el2"), ("event,insn", "has no column el, hcr_el2"),
    (HEADER + ",xt", "names a column twice")])
def test_csv_headers_that_cannot_be(header, error):
    with pytest.raises(TraceError, match=error):
        read(f"{header}\n{ROW}\n")


def test_tlbi_ops_run():
    with lzma.open(SAMPLES / "b2.tlbi.csv.xz") as stream:
        rows, _ = read(stream.read())
    ops = tlbi_ops(rows)
    tlbis = rows[rows["kind"] == K.TLBI]
    assert ops.dtype == s2.TLBI_OP_DTYPE and len(ops) == len(tlbis) > 100 and (ops["flags"] == 1).all()
    assert (ops["xt"] == tlbis["value"]).all() and (ops["vttbr"] == tlbis["vttbr"]).all()
    mem = s2.GuestMemory()
    mem.add(0, 1 << 20)
    assert s2.NestedVM(mem, vcpus=2).tlbi_many(ops).tolist() == [0] * len(ops)


# --- hypothesis --------------------------------------------------------------------------------------------------

U64 = st.integers(0, (1 << 64) - 1) | st.sampled_from([0, 1, 0x40085000, (1 << 64) - 1])
IPAS = st.integers(0, (1 << 52) - 1).map(lambda value: value & ~0xFFF)
COMMS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=15) \
    | st.sampled_from(["CPU 0/KVM", "CPU 12/KVM", "qemu-system-aar", "a b c", "kworker/u8:2-ev", "<...>"])


def hexa(value, tool, width=0, prefix=True):
    """%#0*llx as the kernel prints it, and as the C library does: no 0x before zero."""
    if not prefix:
        return f"{value:x}"
    bare = tool != "ftrace" and value == 0
    return "0" * max(width, 1) if bare else f"{value:#0{width}x}"


@st.composite
def written_events(draw):
    """An event, and the line that a tool writes for it."""
    tool = draw(st.sampled_from(["ftrace", "trace-cmd", "perf"]))
    cpu, pid = draw(st.integers(0, 511)), draw(st.integers(0, 4194304))
    seconds, micros = draw(st.integers(0, 10**7)), draw(st.integers(0, 999_999))
    a, b, c, d = (draw(U64) for _ in range(4))
    page, pages = draw(IPAS), draw(st.integers(0, 1 << 20))
    name, text, said = draw(st.sampled_from([
        ("kvm_guest_fault", f"ipa {hexa(a, tool)}, hsr {hexa(b & 0xFFFFFFFF, tool, 8)}, hxfar {hexa(c, tool, 8)}, "
         f"pc {hexa(d, tool, 16)}", {"start": a, "end": a, "value": b & 0xFFFFFFFF, "va": c, "pc": d,
                                     "access": traceline.access_of(b & 0xFFFFFFFF)}),
        ("kvm_access_fault", f"IPA: {a:x}", {"start": a, "end": a}),
        ("kvm_unmap_hva_range", f"mmu notifier unmap range: {hexa(a, tool, 16)} -- {hexa(b, tool, 16)}",
         {"start": a, "end": b}),
        ("kvm_age_hva", f"mmu notifier age hva: {hexa(a, tool, 16)} -- {hexa(b, tool, 16)}", {"start": a, "end": b}),
        ("kvm_test_age_hva", f"mmu notifier test age hva: {hexa(a, tool, 16)}", {"start": a, "end": a}),
        ("kvm_exit", f"TRAP: HSR_EC: 0x{b & 63:04x} (WHATEVER 1), PC: 0x{a:016x}",
         {"value": b & 63, "pc": a, "flags": 2}),
        ("map", f"(f+0x0/0x10) pgd={a:#x} ipa={page:#x} size={pages << 12:#x} pa={b:#x} prot=0x4",
         {"root": a, "start": page, "end": page + (pages << 12), "pa": b, "value": 4, "access": 2}),
        ("tlb_range", f"(f+0x0/0x10) pgd={a:#x} start={page:#x} pages={pages}",
         {"root": a, "start": page, "end": page + (pages << 12)}),
        ("mn_start", f"(f+0x0/0x10) start={a:#x} end={b:#x} event={c & 3}", {"start": a, "end": b, "value": c & 3}),
    ]))
    comm = draw(COMMS)
    head = {"ftrace": f"{comm:>16}-{pid:<7} [{cpu:03d}] d..1. {seconds:5d}.{micros:06d}: {name}: ",
            "trace-cmd": f"{comm:>16}-{pid:<5} [{cpu:03d}] {seconds:5d}.{micros:06d}: {name + ': ':<22}",
            "perf": f"{comm:>16} {pid:>7} [{cpu:03d}] {seconds:5d}.{micros:06d}: {'kvm:' + name:>32}: "}[tool]
    said |= {"kind": int(traceline.KINDS[name]), "pid": pid, "cpu": cpu, "time": (seconds * 10**6 + micros) * 1000}
    return head + text, {key: value for key, value in said.items() if value}


@given(st.lists(written_events(), min_size=1, max_size=20))
def test_what_is_written_is_read(written):
    rows, reader = read("\n".join(line for line, _ in written) + "\n")
    assert reader.unreadable == 0
    for at, (row, (_, said)) in enumerate(zip(rows, written, strict=True), 1):
        found = fields(row)
        found.pop("vcpu", None)
        assert found == said | {"seq": at}


SEEDS = [HEADER, ROW, *(line for line, _ in HEADS.values() if line.isascii()), *NOT_COUNTED, *UNREADABLE.values(),
         *(TOOLS[tool](*line.split(": ", 1)) for line, _ in BODIES.values() for tool in TOOLS)]
PIECES = st.sampled_from([b"[", b"]", b"(", b")", b":", b" ", b"\n", b"\r", b"0x", b",", b"=", b"-", b"\0", b"\xff",
                          b"\t", b"99999999999", b"ffffffffffffffffff", b"[001] ", b"1.5: ", b" x-1 [0] 1.1: map: ("]) \
    | st.binary(max_size=3)
EDITS = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 12), PIECES), max_size=12)


@given(st.lists(st.sampled_from(SEEDS), min_size=1, max_size=8), EDITS)
def test_no_line_raises(lines, edits):
    data = bytearray("\n".join([EVENT, *lines]).encode(errors="replace"))
    for at, cut, piece in edits:
        at %= len(data) + 1
        data[at:at + cut] = piece
    try:
        rows, reader = read(bytes(data))
    except TraceError as error:
        assert "\n" not in str(error)
    else:
        assert reader.lines == len(bytes(data).removesuffix(b"\n").split(b"\n"))
        assert len(rows) + reader.unreadable <= reader.lines
        assert len(rows) + sum(reader.unused.values()) == sum(reader.events.values())


@given(st.binary(max_size=400), st.sampled_from([b"", f"{EVENT}\n".encode(), f"{HEADER}\n{ROW}\n".encode()]))
def test_no_bytes_raise(data, start):
    try:
        read(start + data)
    except TraceError as error:
        assert not start or "column" in str(error)


@pytest.mark.parametrize("line", ["[" * 200_000, " " * 200_000 + "[", "-1 [" * 50_000, " x-1 [0] " * 20_000,
                                  "(" * 100_000, EVENT + "(" * 100_000, TOOLS["ftrace"](
                                      "kvm_nested_eret", "elr_el2: 0 spsr_el2: 0 " + "h" * 200_000)])
def test_no_line_takes_long(line):
    """Linear in the length: a quadratic reader would need minutes for these (there is no timeout; it would hang)."""
    _, reader = read(f"{EVENT}\n{line}\n")
    assert reader.lines == 2


# --- captures ----------------------------------------------------------------------------------------------------

NAMES = {"a": "a_storm_max_7.2", "b": "b_linux_l2_thp_7.2", "b2": "b2_linux_l2_4k_7.2", "c": "c_storm_lpa2_7.2",
         "d": "d_vmid_rollover_nvhe_7.2", "g2": "g2_nested_notifier_7.2"}
SAMPLE_NAMES = sorted(path.name.partition(".")[0] for path in SAMPLES.glob("*.trace.txt.xz"))
FULL = pytest.mark.skipif(CAPTURES is None, reason="S2SHADOW_CAPTURES does not name the folder of captures")


def capture_files(name, full):
    if full:
        folder = Path(CAPTURES) / NAMES[name]
        return folder / "trace.txt.xz", folder / "tlbi.csv.xz"
    return SAMPLES / f"{name}.trace.txt.xz", SAMPLES / f"{name}.tlbi.csv.xz"


def rows_from(dicts):
    """Slowly made rows as an array."""
    rows = np.zeros(len(dicts), EVENT_DTYPE)
    for name in EVENT_DTYPE.names:
        rows[name] = [given.get(name, UNSET[name]) for given in dicts]
    return rows


def compare_text(file):
    reader = read_trace(file)
    rows = np.concatenate(list(reader))
    seen, notes, dicts, lines = Counter(), [], [], 0
    with lzma.open(file, "rt") as stream:
        for line in stream:
            lines += 1
            event = traceline.event_of(line, lines)
            if event is None:
                continue
            name, said = event
            seen[name] += 1
            if "kind" in said:
                if said["kind"] == K.NOTE:
                    said["value"] = len(notes)
                    notes.append((said["time"], said.pop("note")))
                dicts.append(said)
    assert reader.lines == lines and reader.unreadable == 0 and reader.lost == 0 and reader.truncated is None
    assert reader.events == seen and reader.notes == notes
    assert reader.unused == {name: count for name, count in seen.items() if name not in traceline.KINDS}
    slow = rows_from(dicts)
    for name in EVENT_DTYPE.names:
        assert np.array_equal(rows[name], slow[name]), name


def compare_csv(file):
    reader = read_trace(file)
    rows = np.concatenate(list(reader))
    with lzma.open(file, "rt") as stream:
        assert next(stream).strip() == HEADER
        slow = rows_from([traceline.row_of(line) for line in stream])
    assert reader.unreadable == 0 and reader.lines == len(rows) + 1
    for name in EVENT_DTYPE.names:
        assert np.array_equal(rows[name], slow[name]), name


@pytest.mark.parametrize("name", SAMPLE_NAMES)
def test_samples_against_a_slow_reader(name):
    text, table = capture_files(name, full=False)
    compare_text(text)
    compare_csv(table)


@FULL
@pytest.mark.parametrize("name", NAMES)
def test_captures_against_a_slow_reader(name):
    text, table = capture_files(name, full=True)
    compare_text(text)
    compare_csv(table)


# left_out_of_trace: names of events that lack altogether, classes of exits, operations
LEFT_OUT_EXITS = {"kvm_exit of abort class": {"DABT_LOW", "IABT_LOW"}, "exit:SYS64": {"SYS64"}}
EC = {"UNKNOWN": 0, "WFx": 1, "HVC64": 0x16, "SMC64": 0x17, "SYS64": 0x18, "ERET": 0x1A, "IABT_LOW": 0x20,
      "DABT_LOW": 0x24}


@FULL
@pytest.mark.parametrize("name", NAMES)
def test_captures_count_as_their_checks_say(name):
    text, table = capture_files(name, full=True)
    checks = json.loads((text.parent / "checks.json").read_text())
    left_out = set(checks["left_out_of_trace"])
    reader = read_trace(text)
    rows = np.concatenate(list(reader))
    counts = {event: count for event, count in checks["ftrace"].items() if event not in left_out and count}
    exits = {kind: count for kind, count in checks["exit_classes"].items()
             if not any(kind in kinds for what, kinds in LEFT_OUT_EXITS.items() if what in left_out)}
    counts["kvm_exit"] = sum(exits.values())
    assert [line for line, _, _ in reader.left_out] == ([186481, 510744] if name == "g2" else [])
    for _, event, count in reader.left_out:     # runs of unmaps, of which a comment tells
        counts[event] -= count
    assert reader.events == counts
    is_exit = rows["kind"] == K.EXIT
    for kind, count in exits.items():
        assert np.count_nonzero(is_exit & (rows["value"] == EC[kind])) == count, kind
    notified = Counter(rows["value"][rows["kind"] == K.MN_START].tolist())
    kinds = ["UNMAP", "CLEAR", "PROTECTION_VMA", "PROTECTION_PAGE"]
    assert {kinds[value]: count for value, count in notified.items()} == checks["notifier_events"]

    rows = np.concatenate(list(read_trace(table)))
    counted = Counter()
    names = {value: event for event, value in traceline.CSV_KINDS.items()}
    for kind, el, insn, count in zip(*unique_rows(rows), strict=True):
        event = names[kind]
        op = f" {operation(insn)}" if event == "TLBI" else ""
        counted[f"{event}{op or ' '} el{el}"] += count
    for what, count in checks["trap_stream"].items():
        event, op = what.replace("  ", " ").split()[:2]
        if f"tlbi:{op}" in left_out or event == "ENTRY":    # an ENTRY is kept only if it is new
            continue
        assert counted.pop(what.replace("op1_0_crm6_op2_5", "rvale1"), 0) == count, what
    assert {what.split()[0] for what in counted} <= {"ENTRY"}


def unique_rows(rows):
    """Distinct (kind, el, instruction without Rt) and how often."""
    insn = rows["insn"] & np.uint32(0xFFFFFFE0)
    insn[rows["kind"] != K.TLBI] = 0
    values, counts = np.unique(np.stack([rows["kind"], rows["el"], insn], axis=1), axis=0, return_counts=True)
    return [*values.T.tolist(), counts.tolist()]


def operation(insn):
    return s2.decode_tlbi(insn | 31).name.lower()


# --- numbers of VMs ----------------------------------------------------------------------------------------------


def events_of(*kinds):
    rows = np.zeros(len(kinds), EVENT_DTYPE)
    rows["vm"] = UNKNOWN
    for row, (kind, root, pid) in zip(rows, kinds, strict=True):
        row["kind"], row["root"], row["pid"] = kind, root, pid
    return rows


def test_vm_numbers():
    numbers = VMNumbers()
    first = events_of((K.GUEST_FAULT, 0, 7), (K.MAP, 0x2000, 7), (K.UNMAP, 0x1000, 1), (K.GUEST_FAULT, 0, 8),
                      (K.MN_START, 0, 7), (K.MAP, 0x1000, 9), (K.DESTROY, 0x2000, 1), (K.DESTROY, 0, 1),
                      (K.MAP, 0x2000, 10), (K.EXIT, 0, 10))
    assert numbers.number(first) is first
    assert first["vm"].tolist() == [0, 0, 1, UNKNOWN, UNKNOWN, 1, 0, UNKNOWN, 2, 2]
    later = events_of((K.EXIT, 0, 9), (K.ACCESS_FAULT, 0, 10), (K.EXIT, 0, 8), (K.UNMAP, 0x2000, 3))
    assert numbers.number(later)["vm"].tolist() == [1, 2, UNKNOWN, 2]
    assert len(numbers.number(events_of())) == 0


def test_vm_numbers_that_are_given():
    numbers = VMNumbers({0x5000: 3})
    rows = events_of((K.MAP, 0x5000, 1), (K.MAP, 0x6000, 2), (K.EXIT, 0, 2))
    rows["vm"][0] = 9
    assert numbers.number(rows)["vm"].tolist() == [9, 4, 4]
    assert numbers.roots == {0x5000: 3, 0x6000: 4}


STEPS = st.tuples(st.sampled_from([K.MAP, K.UNMAP, K.TLB_CPU, K.DESTROY]), st.integers(0, 3), st.integers(1, 3))


@given(st.lists(STEPS, max_size=30), st.integers(1, 30))
def test_vm_numbers_in_any_chunks(kinds, chunk):
    """Roots get the same number whatever the chunks; no two live roots share one."""
    whole = VMNumbers().number(events_of(*kinds))
    numbers, live = VMNumbers(), {}
    for at in range(0, len(kinds), chunk):
        part = numbers.number(events_of(*kinds[at:at + chunk]))
        rooted = part["root"] != 0
        assert np.array_equal(part["vm"][rooted], whole["vm"][at:at + chunk][rooted])
    for row in whole[whole["root"] != 0]:
        root, vm = int(row["root"]), int(row["vm"])
        assert live.setdefault(root, vm) == vm and len(set(live.values())) == len(live)
        if row["kind"] == K.DESTROY:
            del live[root]
