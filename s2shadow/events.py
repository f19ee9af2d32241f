"""Events of a trace: the data model.

One row of ``EVENT_DTYPE`` is one event, of a Linux host's ftrace text or of a CSV of trapped instructions.
Fields that an event does not have are 0, unless the table of fields says otherwise.

======  ====  ===============================================================================================
field   type  meaning
======  ====  ===============================================================================================
time    u8    nanoseconds: of the trace clock (text), since the first row (CSV). The two clocks differ.
seq     u8    text: number of the line, from 1; CSV: its ``seq`` column
start   u8    first byte of the range that the event names: IPA, but HVA for the ``*_HVA`` and ``MN_START`` kinds
end     u8    one past its last byte; ``start`` where the event names an address without a size
pa      u8    MAP: output address
va      u8    GUEST_FAULT: FAR (HXFAR); MEMSLOT: HVA of the slot's first byte
pc      u8    program counter of the guest, or ELR_EL2
value   u8    what else the event says; see the kinds
root    u8    the probes' ``pgd``: physical address of the stage-2 table, which names the VM (or the shadow)
vttbr   u8    CSV: VTTBR_EL2 at that moment
vtcr    u8    CSV: VTCR_EL2 at that moment
hcr     u8    CSV: HCR_EL2 at that moment; NESTED_ERET and NESTED_EXCEPTION: L1's
insn    u4    instruction word of a TLBI, MSR or system-register access (Rt included where it is known)
pid     u4    the task (of a vCPU: its thread); CSV: 0
tgid    u4    the process, 0: not in the trace
cpu     i2    CPU of the traced machine; -1: not in the trace
vm      u2    index of the VM; ``UNKNOWN`` until ``VMNumbers`` has named it
vcpu    u2    CSV: as ``cpu``; text: from the thread names that QEMU gives ("CPU 1/KVM"), else ``UNKNOWN``
flags   u2    see the kinds
kind    u1    ``EventKind``
level   i1    table level that a TLB flush names; -2: any
el      u1    CSV: exception level that the instruction ran at
access  u1    GUEST_FAULT: ``Access`` of the fault as KVM reads its syndrome; MAP, RELAX: permissions
======  ====  ===============================================================================================

Rows are 120 bytes without padding; slicing, ``np.concatenate`` and ``np.argsort(events["time"], kind="stable")``
work as on any array.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["EVENT_DTYPE", "RAW_ROW", "UNKNOWN", "EventKind", "Events", "Note", "TraceError", "fault_access"]

Events = npt.NDArray[np.void]

UNKNOWN = 0xFFFF

EVENT_DTYPE = np.dtype([
    ("time", "u8"), ("seq", "u8"), ("start", "u8"), ("end", "u8"), ("pa", "u8"), ("va", "u8"), ("pc", "u8"),
    ("value", "u8"), ("root", "u8"), ("vttbr", "u8"), ("vtcr", "u8"), ("hcr", "u8"), ("insn", "u4"), ("pid", "u4"),
    ("tgid", "u4"), ("cpu", "i2"), ("vm", "u2"), ("vcpu", "u2"), ("flags", "u2"), ("kind", "u1"), ("level", "i1"),
    ("el", "u1"), ("access", "u1")])


RAW_ROW = np.dtype(f"V{EVENT_DTYPE.itemsize}")      # as a view: numpy moves rows field by field, these whole


class EventKind(IntEnum):
    """``EVENT_DTYPE['kind']``; each says which fields it fills beside time, seq, pid and cpu."""

    # KVM's own trace events
    GUEST_FAULT = 1         #: start=IPA, value=ESR, va=FAR, pc, access
    ACCESS_FAULT = 2        #: start=IPA
    UNMAP_HVA = 3           #: start, end (kvm_unmap_hva_range)
    AGE_HVA = 4             #: start, end
    TEST_AGE_HVA = 5        #: start
    EXIT = 6                #: value=exception class, pc; flags: 0 IRQ, 1 SERROR, 2 TRAP, 3 other
    SYS_ACCESS = 7          #: insn, pc; flags bit 0: write (for a TLBI always; its operand is not in the trace)
    NESTED_ERET = 8         #: pc=ELR, value=SPSR, hcr
    NESTED_EXCEPTION = 9    #: pc=ELR, value=ESR, hcr; flags: 0 SYNC, 1 IRQ, 2 other

    # kprobes on the stage-2 code of the traced host
    MAP = 20                #: root, start, end, pa, value=prot, access=permissions
    UNMAP = 21              #: root, start, end
    WRPROTECT = 22          #: root, start, end
    RELAX = 23              #: root, start, value=prot, access=permissions
    MKYOUNG = 24            #: root, start
    AGE = 25                #: root, start, end; flags bit 0: mkold (else the bit is only tested)
    SPLIT = 26              #: root, start, end
    DESTROY = 27            #: root (0: that VM was already torn down)
    GFN_UNMAP = 28          #: start, end: IPA
    MN_START = 29           #: start, end: HVA; value: 0 UNMAP, 1 CLEAR, 2 PROTECTION_VMA, 3 PROTECTION_PAGE
    MN_END = 30             #: start, end: HVA
    MEMSLOT = 31            #: start, end: IPA (empty: it goes); va=HVA, value=slot, flags: 1 dirty log, 2 read-only

    # kprobes on TLB maintenance of the traced host
    TLB_IPA = 40            #: root, start, level
    TLB_IPA_NSH = 41        #: root, start, level
    TLB_RANGE = 42          #: root, start, end
    TLB_VMID = 43           #: root
    TLB_CPU = 44            #: root
    TLB_ALL = 45            #: everything

    # kprobes on nested virtualization in the traced host (L0)
    NESTED_UNMAP = 60       #: every shadow is dropped; flags bit 0: may_block
    NESTED_WRPROTECT = 61   #: every shadow is write-protected
    NESTED_FLUSH = 62   #: every shadow is cleaned to memory
    SHADOW_UNMAP_RANGE = 63     #: root=shadow
    SHADOW_UNMAP_IPA = 64       #: root=shadow
    SHADOW_TLBI_S1 = 65         #: root=shadow
    SHADOW_LOOKUP = 66   #: L0 looks a shadow up
    WALK_NESTED = 67        #: start=L2's IPA
    INJECT_FAULT = 68       #: value=ESR
    HANDLE_TLBI = 69        #: insn, value=Xt: a TLBI of L1 in its handler

    NOTE = 80               #: a line that user space wrote (tracing_mark_write): value indexes ``TraceReader.notes``

    # CSV of instructions; all fill value=Xt, start=X1, insn, el, vcpu, vttbr, vtcr, hcr
    TLBI = 100              #: the instruction, at el
    SET_VTTBR = 101         #: value: what is written
    SET_VTCR = 102          #: value: what is written
    ENTER = 103             #: ERET into a guest
    MARK = 104              #: HINT of the workload: value 0x56... + VM (el 1), 0x5a... snapshot, 0x5b... while running
    FOLD = 105              #: value: that many lines of one flush run were left out


class TraceError(ValueError):
    """A trace that cannot be read at all, or damaged saved events; the text names the file and what is wrong."""


class Note(NamedTuple):
    """A line that user space wrote into the trace: its ``text`` at ``time`` (nanoseconds)."""

    time: int
    text: str


def fault_access(esr: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
    """``Access`` of stage-2 aborts by their ESR_EL2, as KVM reads it (``kvm_is_write_fault``): u8[n] -> u1[n].

    A stage-1 walk (S1PTW) that lacked permission was the hardware's update of a descriptor, a write; cache
    maintenance counts as a write, since WnR is set for it. Syndromes that are no aborts give 0.
    """
    code, walk = esr >> 26 & 0x3F, esr >> 7 & 1 == 1
    data, fetch = (code == 0x24) | (code == 0x25), (code == 0x20) | (code == 0x21)
    permission = esr & 0x3C == 0x0C
    write = np.where(walk, permission, data & (esr >> 6 & 1 == 1))
    access = np.where(write, 2, np.where(fetch & ~walk, 4, 1)) | np.where(walk, 16, 0)
    return np.where(data | fetch, access, 0).astype(np.uint8)
