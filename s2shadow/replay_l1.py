"""Replay where the traced Linux is L1: its stage-2 tables are L1's, its VMs are L2s, its CPUs are L1's vCPUs.

- Its table edits (``map``, ``unmap``, ``relax``, ``wrprotect``, ``split``, ``mkyoung``, ``destroy``) rewrite L1's
  tables in guest memory; a snapshot must find there what the real kernel had.
- ``kvm_guest_fault`` is a touch that L1 had to resolve: the engine must send it on to L1. Once L1 has mapped the page,
  and flushed where it had to, L2 comes back and touches it again: that one fills the shadow.
- The TLBIs that it executed at EL2 go to the engine with the registers of their row.
- Its own MMU notifiers and aging are L1's host side, which a nested L1 does not have below it: shown, not applied.

A trace with less in it is completed as far as it can be, and the result says so: without ``kvm_guest_fault`` a map is
taken as a touch; without a CSV the flush probes stand for the TLBIs; without probes every fault makes a leaf of its
own, and ``kvm_unmap_hva_range`` is L1's unmap and flush.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from s2shadow.config import Stage2Config
from s2shadow.constants import EXEC, EXEC_EL0, HCR_FWB, HCR_VM, READ, WRITE, Kind
from s2shadow.events import EventKind as K
from s2shadow.events import Events
from s2shadow.features import Features
from s2shadow.guesttables import GuestRam, Stage2Writer
from s2shadow.lanes import Lanes, Registers
from s2shadow.mapping import Linear
from s2shadow.memory import GuestMemory
from s2shadow.recording import BADDR, Snapshot
from s2shadow.streams import chosen

if TYPE_CHECKING:
    from s2shadow.replay import Session

__all__ = ["L1Player", "compare_leaves", "flush_operations"]

# Plain integers: looking a member up in an enum costs more than the comparison with it.
(GUEST_FAULT, MAP, UNMAP, WRPROTECT, RELAX, MKYOUNG, SPLIT, DESTROY, TLBI, SET_VTTBR, SET_VTCR, ENTER, NOTE, UNMAP_HVA,
 MN_START, TLB_IPA, TLB_IPA_NSH, TLB_RANGE, TLB_VMID, TLB_CPU, TLB_ALL) = map(int, (
    K.GUEST_FAULT, K.MAP, K.UNMAP, K.WRPROTECT, K.RELAX, K.MKYOUNG, K.SPLIT, K.DESTROY, K.TLBI, K.SET_VTTBR, K.SET_VTCR,
    K.ENTER, K.NOTE, K.UNMAP_HVA, K.MN_START, K.TLB_IPA, K.TLB_IPA_NSH, K.TLB_RANGE, K.TLB_VMID, K.TLB_CPU, K.TLB_ALL))
EDITS = (MAP, UNMAP, WRPROTECT, RELAX, MKYOUNG, SPLIT, DESTROY)
RESOLVES = (MAP, RELAX, MKYOUNG)                        # what L1 answers a fault with
PROBES = (TLB_IPA, TLB_IPA_NSH, TLB_RANGE, TLB_VMID, TLB_CPU, TLB_ALL)
TABLE_ROWS = (TLBI, SET_VTTBR, SET_VTCR, ENTER, int(K.MARK))
PLAYED = (GUEST_FAULT, *EDITS, *PROBES, *TABLE_ROWS, NOTE, UNMAP_HVA, MN_START)
FLUSHING = (TLBI, SET_VTTBR, SET_VTCR, *PROBES)
COLUMNS = ("kind", "time", "cpu", "pid", "start", "end", "root", "pa", "access", "value", "insn", "el", "vttbr", "vtcr",
           "hcr")
ALL_PERMISSIONS = int(READ | WRITE | EXEC | EXEC_EL0)
DEVICE = 1 << 4                                         # KVM_PGTABLE_PROT_DEVICE, Linux 7
PAGE = 4096
HCR = int(HCR_VM | HCR_FWB)
ABSENT = np.uint64(np.iinfo(np.uint64).max)
LINUX_VTCR = 0x802D3590                                 # 48 bits, 4K granule, from level 0, HA
L1_FAULT = int(Kind.L1_FAULT)
MOST_PAGES = 32 << 16           # of one range flush of KVM (MAX_TLBI_RANGE_PAGES)
IPAS2E1IS, IPAS2E1, RIPAS2E1IS, VMALLS12E1IS, VMALLE1IS, VMALLE1, ALLE1IS = (
    0xD50C8020, 0xD50C8420, 0xD50C8040, 0xD50C83DF, 0xD508831F, 0xD508871F, 0xD50C839F)


class L1Player:
    """One L1 with all its VMs: one memory, one context per VMID and table."""

    def __init__(self, session: Session):
        self.session = session
        recording = session.recording
        vms = recording.known_vms
        self.known: dict[int, Registers] = {vm.baddr: (vm.vttbr, vm.vtcr, vm.hcr) for vm in vms}
        self.features = self.choose_features(vm.vtcr for vm in vms)
        bits = min((vm.config(self.features).oa_bits for vm in vms), default=self.features.pa_bits)
        self.mem = GuestMemory()
        self.ram = GuestRam(self.mem, bits)
        self.lanes: Lanes | None = None
        self.registers: dict[int, Registers] = {}       # of each root, as L1 last entered or set it
        self.guests: dict[int, Stage2Writer | None] = {}
        self.vtcr: dict[int, int] = {}                  # CPU: last written
        self.task_root: dict[int, int] = {}
        self.entered: dict[int, int] = {}               # CPU: root
        self.faulted: dict[int, tuple[int, int]] = {}   # task: (IPA, access) that L1 has yet to resolve
        self.waiting: dict[int, tuple[int, int, int]] = {}      # CPU: (root, IPA, access) that L2 touches next
        self.next_vmid = 1
        self.slots = recording.memslots + session.config.slots
        self.snapshots = list(recording.snapshots)
        self.has_table = recording.table is not None
        self.has_faults = self.has_maps = self.has_edits = False
        self.started = False
        self.noted: dict[str, dict[int, Events]] = {}   # tables of L1 just before a snapshot
        self.edited = self.entries = self.faults = self.touches = 0
        self.last_seq = -1                              # of the CSV

    @staticmethod
    def choose_features(vtcrs: Iterator[int]) -> Features:
        """A hypervisor sets VTCR_EL2.DS only with FEAT_LPA2."""
        if any(vtcr >> 32 & 1 for vtcr in vtcrs):
            return Features(pa_bits=52, lpa=True, lpa2=True)
        return Features()

    def start(self, rows: Events) -> None:
        """What the first events show of the trace and its machine."""
        session, recording = self.session, self.session.recording
        self.started = True
        kinds = set(np.unique(rows["kind"]).tolist())
        self.has_table = self.has_table or bool(kinds & {TLBI, ENTER})
        self.has_faults = GUEST_FAULT in kinds
        self.has_maps = MAP in kinds
        if not self.known:
            found = rows["value"][rows["kind"] == SET_VTCR].tolist()
            self.features = self.choose_features(iter(found))
        cpus = session.config.vcpus or recording.cpus or int(rows["cpu"].max(initial=0)) + 1
        self.lanes = session.lanes(self.mem, cpus, self.features, Linear())
        seq = rows["seq"][rows["kind"] >= TLBI]
        earlier = [s for s in self.snapshots if s.seq is not None and len(seq) and s.seq < int(seq.min())]
        del self.snapshots[:len(earlier)]
        if session.memory is not None:
            self.take_tables(session.memory)
        elif earlier:
            self.take_tables(earlier[-1])
        if not self.has_maps:
            self.snapshots = []         # nothing to compare: the trace does not show L1's tables
        if not self.has_maps and self.has_faults:
            session.note("no probe of kvm_pgtable_stage2_map in this trace: each fault makes a 4K leaf of L1, "
                         "mapped to the same address")
        if not self.has_faults and self.has_maps:
            session.note("no kvm_guest_fault in this trace: each map is taken as a touch of the page that it maps")
        if not self.has_table and kinds & set(PROBES):
            session.note("no CSV of TLBIs: the flush probes stand for them")

    def take_tables(self, snapshot: Snapshot) -> None:
        """Begin with captured tables: those of a snapshot that the trace starts after."""
        addresses, pages = snapshot.guest_pages()
        for address, page in zip(addresses.tolist(), pages, strict=True):
            self.ram.cover(address, len(page))
            self.mem.write(address, page)
        capture, _ = snapshot.guest()
        for vm in capture.vms:
            self.registers[vm.baddr] = self.known[vm.baddr] = (vm.vttbr, vm.vtcr, vm.hcr)
            guest = self.guest(vm.baddr)
            if guest is not None:
                for leaf in guest.leaves():
                    self.ram.cover(int(leaf["pa"]), int(leaf["size"]))
        self.session.note(f"L1's tables begin as in snapshot {snapshot.name}")

    # --- VMs

    def regs(self, root: int) -> Registers:
        """What VTTBR, VTCR and HCR of the VM with this table are, as far as the trace has told."""
        found = self.registers.get(root) or self.known.get(root)
        if found is None:
            found = (self.next_vmid << 48 | root, LINUX_VTCR, HCR)
            self.session.note(f"VTTBR and VTCR of some tables are not in this trace: taken as {LINUX_VTCR:#x}")
        if root not in self.registers:
            self.registers[root] = found
            self.next_vmid = max(self.next_vmid, (found[0] >> 48) + 1)
        return found

    def guest(self, root: int) -> Stage2Writer | None:
        """L1's table with that root; None where its registers make no table."""
        regs = self.regs(root)
        guest = self.guests.get(root)
        if root in self.guests and (guest is None or guest.cfg.vtcr == regs[1]):
            return guest
        if guest is not None:
            guest.destroy()             # the page is another VM's now
        try:
            cfg = Stage2Config(regs[0], regs[1], features=self.features, hcr=regs[2] | 1)
            guest = Stage2Writer(self.ram, cfg)
        except ValueError as error:
            guest = None
            self.session.note(f"a table is left out: {error}")
        self.guests[root] = guest
        return guest

    def enter(self, cpu: int, root: int) -> int:
        """Load the VM of ``root`` on the vCPU of a CPU -> the vCPU."""
        assert self.lanes is not None
        vcpu = max(cpu, 0) % self.lanes.vcpu_count
        self.guest(root)
        self.lanes.load(vcpu, self.regs(root))
        return vcpu

    # --- rows

    def play(self, rows: Events) -> None:
        if not self.started:
            self.start(rows)
        assert self.lanes is not None
        if rows["cpu"].max() >= self.lanes.vcpu_count:
            self.session.note(f"the trace names more CPUs than {self.lanes.vcpu_count}: some share a vCPU (--vcpus)")
        played = np.isin(rows["kind"], PLAYED)
        if self.has_table:
            played &= ~np.isin(rows["kind"], PROBES)
        wanted = chosen(rows, played)
        roots = self.roots_of_faults(wanted)
        settled = self.settled(wanted)
        stops = self.stops(wanted)
        waiting = self.waiting
        session = self.session
        columns = zip(*[wanted[name].tolist() for name in COLUMNS], strict=True)
        for i, (kind, time, cpu, pid, start, end, root, pa, access, value, insn, el, *registers) in enumerate(columns):
            if waiting and cpu in waiting and kind not in FLUSHING:
                self.touch(cpu)
            if time >= session.next_tick:
                session.tick(time)
            if i in stops:
                for what, snapshot in stops.pop(i):
                    self.stop(what, snapshot)
            if kind == GUEST_FAULT:
                self.fault(cpu, pid, start, access, roots[i])
            elif kind in EDITS:
                self.edit(kind, cpu, pid, root, start, end, pa, access, value)
            elif kind == TLBI:
                self.on_tlbi(cpu, insn, el, value, (registers[0], registers[1], registers[2]))
            elif kind == ENTER:
                self.on_enter(cpu, (registers[0], registers[1], registers[2]))
            elif kind in (SET_VTTBR, SET_VTCR):
                self.on_register(kind, cpu, el, value)
            elif kind in (MN_START, UNMAP_HVA):
                self.on_unmap_hva(kind, time, cpu, start, end)
            elif kind == NOTE:
                self.on_note(value)
            elif kind in PROBES:
                self.on_probe(kind, cpu, root, start, end)
            if waiting and settled[i] and cpu in waiting:
                self.touch(cpu)

    @staticmethod
    def roots_of_faults(rows: Events) -> list[int]:
        """Of each fault the table that the same task edits next, which is how L1 resolves it; 0 where it does not."""
        at = np.flatnonzero(np.isin(rows["kind"], (GUEST_FAULT, *RESOLVES)))
        order = at[np.argsort(rows["pid"][at], kind="stable")]
        same = rows["pid"][order[1:]] == rows["pid"][order[:-1]]
        roots = np.zeros(len(rows), np.uint64)
        this, following = order[:-1][same], order[1:][same]
        roots[this] = np.where(rows["kind"][following] == GUEST_FAULT, 0, rows["root"][following])
        return roots.tolist()

    @staticmethod
    def settled(rows: Events) -> list[bool]:
        """Whether the next row of the same CPU is known, and no part of a flush: L2 may run in between."""
        settled = np.zeros(len(rows), bool)
        flushing = np.isin(rows["kind"], FLUSHING)
        for cpu in np.unique(rows["cpu"]).tolist():
            at = np.flatnonzero(rows["cpu"] == cpu)
            settled[at[:-1]] = ~flushing[at[1:]]
        return settled.tolist()

    # --- faults

    def fault(self, cpu: int, pid: int, ipa: int, access: int, root: int) -> None:
        """L2's fault as L1 saw it. The engine must pass it on; what it does not is not L1's to resolve."""
        self.faults += 1
        if not self.has_maps:
            self.fault_on_demand(cpu, ipa, access)
            return
        root = root or self.entered.get(cpu, 0) or self.task_root.get(pid, 0)
        if not root:
            self.session.skipped["faults of VMs that are not known yet"] += 1
        elif self.touch_now(cpu, root, ipa, access) == L1_FAULT:
            self.faulted[pid] = (ipa, access)

    def touch_now(self, cpu: int, root: int, ipa: int, access: int) -> int:
        assert self.lanes is not None
        return self.lanes.fault(self.enter(cpu, root), ipa, access)

    def touch(self, cpu: int) -> None:
        """L2 is back after L1 has resolved its fault."""
        root, ipa, access = self.waiting.pop(cpu)
        self.touches += 1
        self.touch_now(cpu, root, ipa, access)

    def fault_on_demand(self, cpu: int, ipa: int, access: int) -> None:
        root = self.made_up_root()
        guest = self.guest(root)
        if self.touch_now(cpu, root, ipa, access) == L1_FAULT and guest is not None:
            page = ipa & -guest.granule
            try:
                guest.map(page, guest.granule, page, ALL_PERMISSIONS)
            except ValueError:
                self.session.skipped["faults beyond the table"] += 1
                return
            self.session.applied["leaves made on demand"] += 1
            self.waiting[cpu] = (root, ipa, access)
            self.touch(cpu)

    def made_up_root(self) -> int:
        """Where nothing names a table: one VM, its root among the tables."""
        if not self.guests:
            root = self.ram.new_table(4096)
            self.registers[root] = (1 << 48 | root, LINUX_VTCR, HCR)
            self.next_vmid = 2
            self.guest(root)
        return next(iter(self.guests))

    # --- edits

    def edit(self, kind: int, cpu: int, pid: int, root: int, start: int, end: int, pa: int, access: int,
             value: int) -> None:
        if kind == DESTROY:
            self.destroy(root)
            return
        guest = self.guest(root)
        if guest is None:
            self.session.skipped["edit of a table that is left out"] += 1
            return
        try:
            if kind == MAP:
                guest.map(start, end - start, pa, access, bool(value & DEVICE))
            elif kind == UNMAP:
                guest.unmap(start, end - start)
            elif kind == WRPROTECT:
                guest.wrprotect(start, end - start)
            elif kind == RELAX:
                guest.relax(start, access)
            elif kind == MKYOUNG:
                guest.mkyoung(start)
            else:
                guest.split(start, end - start)
        except ValueError:
            self.session.skipped["edit beyond the table"] += 1
            return
        self.edited += 1
        if kind in RESOLVES:
            self.resolve(kind, cpu, pid, root, start, max(end, start + guest.granule), access)

    def destroy(self, root: int) -> None:
        guest = self.guests.pop(root, None)
        if guest is not None:
            guest.destroy()
            self.edited += 1
            self.registers.pop(root, None)

    def resolve(self, kind: int, cpu: int, pid: int, root: int, start: int, end: int, access: int) -> None:
        """If this is what a fault of the same task waits for, L2 touches the page as soon as L1 is through."""
        self.task_root[pid] = root
        if not self.has_faults and kind != MKYOUNG:
            self.waiting[cpu] = (root, start, 2 if access & 2 else 1)
            return
        fault = self.faulted.get(pid)
        if fault is not None and start <= fault[0] < end:
            del self.faulted[pid]
            self.waiting[cpu] = (root, *fault)

    # --- instructions

    def on_tlbi(self, cpu: int, insn: int, el: int, xt: int, regs: Registers) -> None:
        if el == 2:
            self.issue(cpu, insn, xt, regs)
        else:
            self.session.skipped["TLBIs below EL2 (the guest's own stage 1)"] += 1

    def issue(self, cpu: int, insn: int, xt: int, regs: Registers) -> None:
        from s2shadow.tlbi import UndefinedInstruction

        assert self.lanes is not None
        try:
            self.lanes.tlbi(max(cpu, 0) % self.lanes.vcpu_count, insn, xt, regs)
        except UndefinedInstruction:
            self.session.skipped["TLBIs that this machine does not have"] += 1
            return
        self.session.tlbis += 1

    def on_register(self, kind: int, cpu: int, el: int, value: int) -> None:
        if el != 2:
            return
        if kind == SET_VTCR:
            self.vtcr[cpu] = value
        elif value & BADDR:
            root = value & BADDR
            old = self.registers.get(root) or self.known.get(root)
            vtcr = self.vtcr.get(cpu, old[1] if old else LINUX_VTCR)
            self.registers[root] = (value, vtcr, old[2] if old else HCR)

    def on_enter(self, cpu: int, regs: Registers) -> None:
        root = regs[0] & BADDR
        if regs[2] & 1 and root:
            self.registers[root] = regs
            self.entered[cpu] = root
            self.enter(cpu, root)
            self.entries += 1

    def on_probe(self, kind: int, cpu: int, root: int, start: int, end: int) -> None:
        """A flush function of KVM, where no CSV has its instructions."""
        regs = self.regs(root) if root else (0, LINUX_VTCR, HCR)
        for insn, xt in flush_operations(kind, start, end):
            self.issue(cpu, insn, xt, regs)

    def on_unmap_hva(self, kind: int, time: int, cpu: int, start: int, end: int) -> None:
        """Only a trace without probes needs it: L1 unmaps the pages behind the range, and flushes them."""
        if self.session.is_repeated(kind == UNMAP_HVA, cpu, start, end):
            return
        if self.has_maps or not len(self.slots):
            self.session.skipped["MMU notifiers of L1 itself (shown, not applied)"] += 1
            return
        root = self.made_up_root()
        guest = self.guest(root)
        assert guest is not None
        for _, low, high in self.slots.lookup(*whole_pages(start, end), time):
            if high <= 1 << guest.cfg.ia_bits:
                guest.unmap(low, high - low)
                for insn, xt in flush_operations(TLB_RANGE, low, high):
                    self.issue(cpu, insn, xt, self.regs(root))
                self.session.applied["unmaps by L1"] += 1

    def on_note(self, index: int) -> None:
        """Without a CSV, what the workload wrote tells when a snapshot was taken."""
        if self.snapshots and not self.has_table:
            name = snapshot_name(self.session.note_text(index))
            if name == self.snapshots[0].name:
                self.compare(self.snapshots.pop(0), self.tables())

    # --- snapshots and the end

    def stops(self, rows: Events) -> dict[int, list[tuple[str, Snapshot]]]:
        """The machine was stopped for a snapshot somewhere between two rows of the CSV: {row before which: what}.

        The tables are noted after the first of the two, and compared with the captured ones before the second.
        """
        found: dict[int, list[tuple[str, Snapshot]]] = {}
        table = np.flatnonzero(np.isin(rows["kind"], TABLE_ROWS))
        if not len(table):
            return found
        seq = np.maximum.accumulate(rows["seq"][table].astype(np.int64))
        self.last_seq = max(self.last_seq, int(seq[-1]))
        for snapshot in self.snapshots:
            if snapshot.seq is None:
                continue
            at = int(np.searchsorted(seq, snapshot.seq, side="right"))
            if at or snapshot.name not in self.noted:
                found.setdefault(int(table[at - 1]) + 1 if at else 0, []).append(("note", snapshot))
            if at == len(table):
                break
            found.setdefault(int(table[at]), []).append(("compare", snapshot))
        return found

    def stop(self, what: str, snapshot: Snapshot) -> None:
        if what == "note":
            self.noted[snapshot.name] = self.tables()
        else:
            self.snapshots.remove(snapshot)
            self.compare(snapshot, self.noted.pop(snapshot.name))

    def tables(self) -> dict[int, Events]:
        """All leaves of L1, by root."""
        return {root: guest.leaves() for root, guest in self.guests.items() if guest is not None}

    def compare(self, snapshot: Snapshot, before: dict[int, Events]) -> None:
        after = self.tables()
        capture, leaves = snapshot.guest()
        for vm in capture.vms:
            theirs = leaves[vm.baddr]
            empty = theirs[:0]
            found = compare_leaves(before.get(vm.baddr, empty), after.get(vm.baddr, empty), theirs)
            # a call of each CPU may have been under way: traced, and not in the table yet
            found["under_way"] = self.lanes.vcpu_count if snapshot.running and self.lanes else 0
            self.session.checks["tables"].append({"snapshot": snapshot.name, "vm": vm.vm, **found})

    def finish(self) -> None:
        for cpu in list(self.waiting):
            self.touch(cpu)
        for snapshot in self.snapshots:         # taken right after the last row
            if snapshot.seq is not None and snapshot.seq <= self.last_seq:
                self.compare(snapshot, self.noted.get(snapshot.name) or self.tables())

    def compare_policies(self) -> None:
        """What one policy maps the others must map alike; of VMs that are gone a shadow may keep stale leaves."""
        if self.lanes is not None:
            alive = {self.regs(root)[:2] for root, guest in self.guests.items() if guest is not None}
            self.session.checks["same_mapping"].append(self.lanes.agreement(lambda *regs: regs in alive))

    def applied(self) -> dict[str, int]:
        """What was done so far, in words."""
        return {"edits of L1's tables": self.edited, "entries into L2": self.entries, "faults that L1 saw": self.faults,
                "touches after L1 resolved a fault": self.touches}


def snapshot_name(text: str) -> str | None:
    """The name in ``SCN snap NAME`` or ``{"ev": "snap", "name": NAME}``, which workloads write."""
    if text.startswith("SCN snap "):
        return text[9:].strip()
    try:
        note = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return note.get("name") if isinstance(note, dict) and str(note.get("ev")).startswith("snap") else None


def flush_operations(kind: int, start: int, end: int, page_bits: int = 12) -> Iterator[tuple[int, int]]:
    """(instruction, operand) of what KVM executes in one of its flush functions."""
    if kind in (TLB_IPA, TLB_IPA_NSH):
        yield IPAS2E1IS if kind == TLB_IPA else IPAS2E1, start >> 12
        yield (VMALLE1IS if kind == TLB_IPA else VMALLE1), 0
    elif kind == TLB_RANGE:
        yield from range_operations(start >> page_bits, end - start >> page_bits, page_bits)
        yield VMALLE1IS, 0
    elif kind == TLB_VMID:
        yield VMALLS12E1IS, 0
    elif kind == TLB_CPU:
        yield VMALLE1, 0
    else:
        yield ALLE1IS, 0


def whole_pages(start: int, end: int) -> tuple[int, int]:
    """A range of host addresses, rounded out to pages."""
    return start & -PAGE, min(-(-end // PAGE) * PAGE, (1 << 64) - PAGE)


def range_operations(page: int, count: int, page_bits: int) -> Iterator[tuple[int, int]]:
    """RIPAS2E1IS for pages, each (NUM + 1) << (5 * SCALE + 1) of them, and IPAS2E1IS for an odd one."""
    granule = {12: 1, 14: 2, 16: 3}[page_bits]
    if count > MOST_PAGES:
        yield VMALLS12E1IS, 0
        return
    for scale in (3, 2, 1, 0):
        unit = 5 * scale + 1
        while count >> unit:
            number = min(count >> unit, 32)
            yield RIPAS2E1IS, granule << 46 | scale << 44 | number - 1 << 39 | page & (1 << 37) - 1
            page, count = page + (number << unit), count - (number << unit)
    if count:
        yield IPAS2E1IS, page << page_bits - 12


def compare_leaves(before: Events, after: Events, theirs: Events) -> dict[str, int]:
    """A captured table against ours just before and just after it was captured (all ``LEAF_DTYPE``) -> counts.

    In 4 KiB pages: ``pages`` that theirs maps, ``same`` (as before or after), and what is explained by neither:
    ``other_pa``, ``only_replay``, ``only_tables``; ``in_between``: pages whose state changed while it was captured.
    In leaves: ``leaves``, ``equal_leaves`` (same address, size, output and permissions, as before or after),
    ``other_perm`` (only those differ). Access flags are not compared.
    """
    pages, pas = in_pages(theirs)
    known = [in_pages(before), in_pages(after)]
    every = np.sort(np.concatenate([pages, known[0][0], known[1][0]]))
    every = every[np.diff(every, prepend=ABSENT) != 0]
    target = lookup(every, pages, pas)
    was, became = (lookup(every, *mine) for mine in known)
    explained = (target == was) | (target == became)
    left, present = ~explained, target != ABSENT
    mine = np.where(was != ABSENT, was, became)
    equal, alike = matching(theirs, np.concatenate([before, after]))
    return {"pages": len(pages), "same": int(np.count_nonzero(explained & present)),
            "in_between": int(np.count_nonzero(was != became)),
            "other_pa": int(np.count_nonzero(left & present & (mine != ABSENT))),
            "only_replay": int(np.count_nonzero(left & ~present)),
            "only_tables": int(np.count_nonzero(left & present & (mine == ABSENT))),
            "leaves": len(theirs), "equal_leaves": int(np.count_nonzero(equal)),
            "other_perm": int(np.count_nonzero(alike & ~equal))}


def lookup(addresses: npt.NDArray[np.uint64], pages: npt.NDArray[np.uint64],
           pas: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output of each address, ABSENT where the (sorted) pages lack it."""
    if not len(pages):
        return np.full(len(addresses), ABSENT)
    at = np.minimum(np.searchsorted(pages, addresses), len(pages) - 1)
    return np.where(pages[at] == addresses, pas[at], ABSENT)


def matching(theirs: Events, mine: Events) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which of their leaves are among ours: altogether, and but for the permissions."""
    names = ["ipa", "size", "pa"]
    return tuple(np.isin(packed(theirs, columns), packed(mine, columns))    # type: ignore[return-value]
                 for columns in ([*names, "perm"], names))


def packed(leaves: Events, names: list[str]) -> npt.NDArray[np.void]:
    """Rows of some fields as values that compare as a whole."""
    rows = np.stack([leaves[name].astype(np.uint64) for name in names], axis=1)
    return np.ascontiguousarray(rows).view(np.dtype((np.void, 8 * len(names)))).ravel()


def in_pages(leaves: npt.NDArray[np.void]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Each 4 KiB page of the leaves: (address, output address)."""
    counts = (leaves["size"] >> np.uint64(12)).astype(np.int64)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    within = number.astype(np.uint64) << np.uint64(12)
    return np.repeat(leaves["ipa"], counts) + within, np.repeat(leaves["pa"], counts) + within
