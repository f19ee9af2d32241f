"""Replay where the traced Linux is L0: a host that runs a guest hypervisor (L1) with guests of its own (L2).

- Faults of L2 go to the engine, on the vCPU of L1 whose thread took them, under the registers that L1 last wrote
  before it entered L2. Faults of L1 itself are served by L0's own table and touch no shadow.
- L1's TLBIs (EL1 to the machine, virtual EL2 to L1) go to the engine; what L0 executes in answer is counted only.
- L0's MMU notifiers are ``vm.unmap`` of what the memory slots say, its aging ``vm.age``, its write protection dirty
  logging.
- L0's own table is what the trace shows it mapping, and what a snapshot shows; the engine takes pages from there.

L1's table writes are in no trace. Its tables are those of the last snapshot passed, and since then what L0's answers
tell: a fault that L0 answers with a page of the shadow shows L1's leaf (the shadow's address is L0's for L1's output,
and the mapping carries L1's level), a fault that it injects shows that there was none, or one that forbids it.
Without any of that, every fault makes a leaf of L1 to the same address.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from s2shadow.config import Stage2Config
from s2shadow.constants import EXEC, EXEC_EL0, HCR_FWB, HCR_VM, READ, WRITE, Kind
from s2shadow.events import UNKNOWN, Events
from s2shadow.events import EventKind as K
from s2shadow.features import Features
from s2shadow.guesttables import GuestRam, Stage2Writer
from s2shadow.lanes import Lanes, Registers
from s2shadow.mapping import HostMapping
from s2shadow.memory import GuestMemory
from s2shadow.recording import BADDR, Snapshot
from s2shadow.replay_l1 import ABSENT, in_pages, lookup, whole_pages
from s2shadow.streams import chosen

if TYPE_CHECKING:
    from s2shadow.replay import Session

__all__ = ["Backing", "L0Player"]

(GUEST_FAULT, NESTED_ERET, NESTED_EXCEPTION, MAP, UNMAP, WRPROTECT, AGE, GFN_UNMAP, MN_START, UNMAP_HVA, AGE_HVA,
 TEST_AGE_HVA, MEMSLOT, HANDLE_TLBI, INJECT_FAULT, TLBI, SET_VTTBR, SET_VTCR) = map(int, (
    K.GUEST_FAULT, K.NESTED_ERET, K.NESTED_EXCEPTION, K.MAP, K.UNMAP, K.WRPROTECT, K.AGE, K.GFN_UNMAP, K.MN_START,
    K.UNMAP_HVA, K.AGE_HVA, K.TEST_AGE_HVA, K.MEMSLOT, K.HANDLE_TLBI, K.INJECT_FAULT, K.TLBI, K.SET_VTTBR, K.SET_VTCR))
ANSWERS = (MAP, INJECT_FAULT)
VCPU_ROWS = (GUEST_FAULT, NESTED_ERET, NESTED_EXCEPTION, MAP, HANDLE_TLBI, INJECT_FAULT)
PLAYED = (GUEST_FAULT, NESTED_ERET, NESTED_EXCEPTION, MAP, UNMAP, WRPROTECT, AGE, GFN_UNMAP, MN_START, UNMAP_HVA,
          AGE_HVA, TEST_AGE_HVA, MEMSLOT, HANDLE_TLBI, INJECT_FAULT, TLBI, SET_VTTBR, SET_VTCR, int(K.ENTER),
          int(K.MARK))
COLUMNS = ("kind", "time", "cpu", "pid", "tgid", "vcpu", "start", "end", "root", "pa", "access", "value", "insn", "el",
           "hcr", "flags", "va", "seq")
MN_EVENTS = ("UNMAP", "CLEAR", "PROTECTION_VMA", "PROTECTION_PAGE")
PAGE, FRAME = 4096, 2 << 20
ALL_PERMISSIONS = int(READ | WRITE | EXEC | EXEC_EL0)
L1_FAULT, MAPPED, HIT = int(Kind.L1_FAULT), int(Kind.MAPPED), int(Kind.HIT)
HCR = int(HCR_VM | HCR_FWB)
LINUX_VTCR = 0x802D3590             # 48 bits, 4K granule, from level 0, HA
STAGE2_OP1 = 4                      # of IPAS2*, RIPAS2*, VMALLS12* and ALLE1*
VMALLE1IS, VMALLE1 = 0xD5088300, 0xD5088700
IPAS2E1IS, VMALLS12E1IS = 0xD50C8020, 0xD50C83DF
TAG_SHIFT = 55                      # Linux keeps L1's level in software bits 58:55 of a shadow leaf
MANY_CHANGES = 4096
LOG_DIRTY = 1
FSC_PERMISSION = 0x0C
BIG_STEP = 1 << 30
PA_BITS = 48
LARGEST_MAP = 4 << 30
LARGEST_CHANGE = 1 << 42            # the bitmaps of aging and dirty logging have a bit for each page


class Backing:
    """What L0 backs L1's memory with: output address and permissions of each page, and which 2 MiB are one block."""

    def __init__(self) -> None:
        self.frames: dict[int, tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]] = {}
        self.blocks: set[int] = set()
        self.owner: dict[int, int] = {}         # output page: cIPA; of blocks that of their first page alone

    def put(self, cipa: int, size: int, pa: int, perm: int) -> None:
        for at in range(cipa & -FRAME, cipa + size, FRAME):
            pas, perms = self.frames.setdefault(at >> 21, (np.zeros(512, np.uint64), np.zeros(512, np.uint8)))
            low, high = max(at, cipa), min(at + FRAME, cipa + size)
            where = slice((low - at) >> 12, (high - at) >> 12)
            outputs = np.arange(low - cipa + pa, high - cipa + pa, PAGE, dtype=np.uint64)
            pas[where], perms[where] = outputs + np.uint64(1), perm     # bit 0: there is one
            if high - low == FRAME and not (low - cipa + pa) % FRAME:
                self.blocks.add(at >> 21)
                self.owner[low - cipa + pa >> 12] = low
            else:
                self.blocks.discard(at >> 21)
                self.owner.update(zip((outputs >> np.uint64(12)).tolist(), range(low, high, PAGE), strict=True))

    def remove(self, start: int, end: int) -> None:
        for at in range(start & -FRAME, end, FRAME):
            frame = self.frames.get(at >> 21)
            if frame is not None:
                frame[0][(max(at, start) - at) >> 12:(min(at + FRAME, end) - at) >> 12] = 0
                self.blocks.discard(at >> 21)

    def output(self, cipa: int) -> int | None:
        """Output address of one page."""
        frame = self.frames.get(cipa >> 21)
        value = int(frame[0][cipa >> 12 & 511]) if frame is not None else 0
        return value & ~1 | cipa & 0xFFF if value else None

    def canonical(self, pa: int) -> int | None:
        """The page of L1's memory that an output page backs."""
        page = pa & -PAGE
        for start in (page, page & -FRAME):
            cipa = self.owner.get(start >> 12)
            if cipa is not None and self.output(cipa + page - start) == page:
                return cipa + page - start
        return None

    def populate(self, cipa: int, access: int) -> HostMapping | None:
        """As ``vm.host.populate``."""
        frame = self.frames.get(cipa >> 21)
        value = int(frame[0][cipa >> 12 & 511]) if frame is not None else 0
        if frame is None or not value:
            return None
        perm = int(frame[1][cipa >> 12 & 511])
        if cipa >> 21 in self.blocks:
            return HostMapping(value & -FRAME, FRAME, perm)
        return HostMapping(value & ~1, PAGE, perm)

    def pages(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Every page: (cIPA, output), sorted."""
        if not self.frames:
            return np.empty(0, np.uint64), np.empty(0, np.uint64)
        numbers = sorted(self.frames)
        values = np.concatenate([self.frames[number][0] for number in numbers])
        starts = np.repeat(np.array(numbers, np.uint64) << np.uint64(21), 512)
        cipas = starts + np.tile(np.arange(512, dtype=np.uint64) << np.uint64(12), len(numbers))
        return cipas[values != 0], values[values != 0] - np.uint64(1)


class Machine:
    """One L1: its memory and tables, what backs it, its vCPUs, and the engines over it."""

    def __init__(self, session: Session, vcpus: int):
        self.session = session
        self.features = Features()
        self.mem = GuestMemory()
        self.ram = GuestRam(self.mem)
        self.backing = Backing()
        self.lanes: Lanes = session.lanes(self.mem, vcpus, self.features, self.backing.populate)
        self.threads: dict[int, int] = {}
        self.registers: list[list[int]] = [[0, 0] for _ in range(vcpus)]        # L1's VTTBR and VTCR
        self.inside: list[Registers | None] = [None] * vcpus                     # what L2 runs under
        self.hcr = [HCR] * vcpus
        self.tables: dict[tuple[int, int], Stage2Writer | None] = {}
        self.leaves: dict[int, Events] = {}                                      # of the last snapshot, by root
        self.table_pages: list[int] = []
        self.touched: dict[int, set[int]] = {}          # root: pages that L2 faulted on since the last snapshot
        self.logged: list[tuple[int, int]] = []

    def vcpu(self, pid: int, named: int) -> int:
        """The vCPU of a thread: by its name, else by its turn."""
        if named != UNKNOWN:
            return named % self.lanes.vcpu_count
        return self.threads.setdefault(pid, len(self.threads)) % self.lanes.vcpu_count

    def table(self, regs: Registers) -> Stage2Writer | None:
        """L1's table under these registers; None where stage 2 is off or they make none."""
        key = regs[0] & BADDR, regs[1]
        if key not in self.tables:
            self.tables[key] = None
            if regs[2] & 1:
                try:
                    cfg = Stage2Config(*regs[:2], features=self.features, hcr=regs[2])
                    self.tables[key] = Stage2Writer(self.ram, cfg)
                except ValueError as error:
                    self.session.note(f"a table of L1 is left out: {error}")
        return self.tables[key]


class L0Player:
    """All nested machines of a trace, by the process that runs each."""

    def __init__(self, session: Session):
        self.session = session
        recording = session.recording
        self.snapshots = list(recording.snapshots)
        self.slots = recording.memslots + session.config.slots
        self.host_root: int | None = None
        self.machines: dict[int, Machine] = {}
        self.on_cpu: dict[int, tuple[Machine, int]] = {}
        self.has_table = recording.table is not None
        self.has_maps = self.has_age = self.has_handlers = self.has_notifier_probe = False
        self.vcpus = session.config.vcpus or 1
        self.started = False
        self.counts = {"l2": 0, "entries": 0, "as recorded": 0, "otherwise": 0,
                       "unanswered": 0}
        self.last_change: dict[str, Any] | None = None
        self.change_pid = self.change_line = self.line = 0
        self.last_seq = -1                      # of the CSV

    def start(self, rows: Events) -> None:
        session = self.session
        self.started = True
        kinds = set(np.unique(rows["kind"]).tolist())
        self.has_table = self.has_table or TLBI in kinds
        self.has_maps = MAP in kinds
        if session.config.vcpus is None:
            own = rows[np.isin(rows["kind"], VCPU_ROWS)]
            named = own["vcpu"][own["vcpu"] != UNKNOWN]
            self.vcpus = int(named.max()) + 1 if len(named) else max(len(np.unique(own["pid"])), 1)
        if session.memory is not None:
            self.take_snapshot(session.memory)
            session.note(f"L1's tables begin as in snapshot {session.memory.name}")
        elif self.snapshots:
            self.take_snapshot(self.snapshots[0], only_guest=True)
            session.note(f"until snapshot {self.snapshots[0].name} is passed, L1's tables are its")
        if self.snapshots:
            capture, _ = self.snapshots[0].host()
            self.host_root = None if capture.host is None else capture.host.vttbr & BADDR
        if not self.has_maps:
            session.note("no probe of kvm_pgtable_stage2_map in this trace: each fault of L2 makes a 4K leaf of L1 to "
                         "the same address, backed by the same")
        if not self.has_table:
            session.note("no CSV of instructions: L1's VTTBR and VTCR are not known, all its L2s count as one")
        if not len(self.slots) and not np.isin(rows["kind"], (MEMSLOT, GFN_UNMAP)).any():
            session.note("no memory slots are known: MMU notifiers cannot be applied (--memslot)")

    def machine(self, tgid: int = 0) -> Machine:
        """The machine of a process; where the trace names none, all threads are of one."""
        if tgid not in self.machines:
            if 0 in self.machines:
                self.machines[tgid] = self.machines.pop(0)      # it was made before its process was known
            else:
                self.machines[tgid] = Machine(self.session, self.vcpus)
        return self.machines[tgid]

    def numbered(self, vm: int) -> Machine:
        """The machine that a memory slot names by its number."""
        known = list(self.machines.values())
        return known[vm] if vm < len(known) else known[0] if known else self.machine()

    # --- rows

    def play(self, rows: Events) -> None:
        if not self.started:
            self.start(rows)
        wanted = chosen(rows, np.isin(rows["kind"], PLAYED))
        answers = self.answers(wanted)
        stops = self.stops(wanted)
        session = self.session
        columns = zip(*[wanted[name].tolist() for name in COLUMNS], strict=True)
        for i, row in enumerate(columns):
            kind, time, cpu, pid, tgid, vcpu, start, end, root, pa, access, value, insn, el, hcr, flags, va, line = row
            if time >= session.next_tick:
                session.tick(time)
            if i in stops:
                self.pass_snapshot(stops.pop(i))
            self.line = line
            if kind in VCPU_ROWS:
                machine = self.machine(tgid)
                number = machine.vcpu(pid, vcpu)
                self.on_cpu[cpu] = machine, number
                if kind == GUEST_FAULT:
                    answer = wanted[answers[i]] if answers[i] >= 0 else None
                    self.fault(machine, number, start, access, answer)
                elif kind == NESTED_ERET:
                    self.enter(machine, number, hcr)
                elif kind == NESTED_EXCEPTION:
                    machine.inside[number] = None
                elif kind == MAP:
                    self.on_map(machine, number, root, start, end, pa, access)
                elif kind == HANDLE_TLBI:
                    self.on_handler(machine, number, insn, value)
            elif kind == TLBI:
                self.on_tlbi(cpu, el, insn, value)
            elif kind in (SET_VTTBR, SET_VTCR):
                if el == 1:
                    machine, number = self.running_on(cpu)
                    machine.registers[number][kind == SET_VTCR] = value
            elif kind == UNMAP:
                self.on_unmap(pid, root, start, end)
            elif kind in (MN_START, UNMAP_HVA):
                self.on_notifier(kind, cpu, pid, time, start, end, value)
            elif kind == GFN_UNMAP:
                self.on_gfn_unmap(pid, time, start, end)
            elif kind == AGE:
                self.on_age(root, start, end, flags)
            elif kind in (AGE_HVA, TEST_AGE_HVA):
                self.on_age_hva(kind, time, start, end)
            elif kind == WRPROTECT:
                self.on_wrprotect(root, start, end)
            elif kind == MEMSLOT:
                self.on_memslot(pid, time, start, end, flags, va)

    @staticmethod
    def answers(rows: Events) -> list[int]:
        """Of each fault the row in which the same thread answers it (MAP or INJECT_FAULT), -1 where it does not."""
        at = np.flatnonzero(np.isin(rows["kind"], (GUEST_FAULT, NESTED_ERET, *ANSWERS)))
        order = at[np.argsort(rows["pid"][at], kind="stable")]
        same = rows["pid"][order[1:]] == rows["pid"][order[:-1]]
        found = np.full(len(rows), -1)
        this, following = order[:-1][same], order[1:][same]
        found[this] = np.where(np.isin(rows["kind"][following], ANSWERS), following, -1)
        return found.tolist()

    def stops(self, rows: Events) -> dict[int, Snapshot]:
        """{row: snapshot that was taken before it}: right after the last instruction before a snapshot."""
        found: dict[int, Snapshot] = {}
        table = np.flatnonzero(rows["kind"] >= TLBI)
        if len(table):
            seq = np.maximum.accumulate(rows["seq"][table].astype(np.int64))
            self.last_seq = max(self.last_seq, int(seq[-1]))
            for snapshot in self.snapshots:
                at = len(seq) if snapshot.seq is None else int(np.searchsorted(seq, snapshot.seq, side="right"))
                if at < len(seq):
                    found[int(table[at - 1]) + 1 if at else 0] = snapshot
        return found

    def running_on(self, cpu: int) -> tuple[Machine, int]:
        """Whose instructions a CPU executes: those of the vCPU thread that the text last showed there."""
        return self.on_cpu.get(cpu) or (self.machine(), max(cpu, 0) % self.vcpus)

    # --- L1 and L2

    def enter(self, machine: Machine, vcpu: int, hcr: int) -> None:
        """L1 enters L2, or a context with stage 2 off."""
        vttbr, vtcr = machine.registers[vcpu]
        if not self.has_table:
            vttbr, vtcr = (1 << 48 | self.made_up_root(machine), LINUX_VTCR) if hcr & 1 else (0, 0)
        regs = (vttbr, vtcr, hcr)
        machine.hcr[vcpu] = hcr
        machine.inside[vcpu] = regs
        machine.table(regs)
        machine.lanes.load(vcpu, regs)
        self.counts["entries"] += 1

    @staticmethod
    def made_up_root(machine: Machine) -> int:
        if not machine.tables:
            root = machine.ram.new_table(PAGE)
            machine.table((1 << 48 | root, LINUX_VTCR, HCR))
        return next(iter(machine.tables))[0]

    def fault(self, machine: Machine, vcpu: int, ipa: int, access: int, answer: Any) -> None:
        regs = machine.inside[vcpu]
        if regs is None:
            self.session.skipped["faults of L1 itself"] += 1
            return
        self.counts["l2"] += 1
        table = machine.table(regs)
        if answer is None:
            if not self.has_maps:
                self.make_leaf(machine, table, ipa)
        elif int(answer["kind"]) == INJECT_FAULT:
            self.learn_fault(table, ipa, int(answer["value"]))
        elif self.is_shadow(int(answer["root"])):
            try:
                self.learn_leaf(machine, table, ipa, answer)
            except ValueError:
                self.session.skipped["leaves of L1 that cannot be"] += 1
        kind = machine.lanes.fault(vcpu, ipa, access)
        if kind in (MAPPED, HIT):
            machine.touched.setdefault(regs[0] & BADDR, set()).add(ipa & -PAGE)
        if answer is None:
            self.counts["unanswered"] += 1
        else:
            self.counts["as recorded" if as_recorded(kind, access, answer) else "otherwise"] += 1

    def is_shadow(self, root: int) -> bool:
        return root != self.host_root

    def make_leaf(self, machine: Machine, table: Stage2Writer | None, ipa: int) -> None:
        """Without probes: L1 maps the page to the same address, and so does L0."""
        page = ipa & -PAGE
        try:
            machine.ram.cover(page, PAGE)
            if table is not None and not table.find(page)[2] & 1:
                table.map(page, PAGE, page, ALL_PERMISSIONS)
                self.session.applied["leaves made on demand"] += 1
        except ValueError:
            self.session.skipped["faults beyond the table"] += 1
            return
        if machine.backing.output(page) is None:
            machine.backing.put(page, PAGE, page, ALL_PERMISSIONS)

    def learn_leaf(self, machine: Machine, table: Stage2Writer | None, ipa: int, answer: Any) -> None:
        """L0 has mapped a page of the shadow: L1's leaf leads to the page of its memory that has this output."""
        perm = int(answer["access"])
        page = ipa & -PAGE
        pa = (int(answer["pa"]) + page - int(answer["start"])) & -PAGE
        if not in_reach(pa) or not in_reach(page):
            return
        if table is None:                       # stage 2 off: the address is L1's already
            machine.ram.cover(page, PAGE)
            if machine.backing.output(page) is None:
                machine.backing.put(page, PAGE, pa, ALL_PERMISSIONS)
            return
        level, _, desc = table.find(page)
        now = table.output(page, level, desc)
        canonical = machine.backing.canonical(pa)
        if canonical is None:
            canonical = now if now is not None else page
            machine.backing.put(canonical, PAGE, pa, ALL_PERMISSIONS)
        if now == canonical and desc >> 6 & 3 == perm & 3:
            return
        tag = int(answer["value"]) >> TAG_SHIFT & 0xF
        size = 1 << table.shift[tag] if tag in table.shift and tag >= table.biggest else PAGE
        if (page ^ canonical) & (size - 1):
            size = PAGE
        if now is not None:
            table.unmap(page & -size, size)
        table.map(page & -size, size, canonical & -size, perm)
        self.session.applied["leaves of L1 learned from L0's answers"] += 1

    def learn_fault(self, table: Stage2Writer | None, ipa: int, esr: int) -> None:
        """L0 has passed the fault on: L1 has no leaf there, or one that forbids the access."""
        if table is None or ipa >> table.cfg.ia_bits:
            return
        page = ipa & -PAGE
        _, _, desc = table.find(page)
        if not desc & 1:
            return
        if esr & 0x3C == FSC_PERMISSION:
            table.wrprotect(page, PAGE)
        else:
            table.unmap(page, PAGE)
        self.session.applied["leaves of L1 gone, as L0's answers tell"] += 1

    # --- TLBIs

    def on_tlbi(self, cpu: int, el: int, insn: int, xt: int) -> None:
        """An instruction of the CSV: at EL1 it is L1's, and traps; at EL2 it is L0's answer."""
        if el != 1:
            self.session.skipped["TLBIs of L0 (its answers)"] += 1
        elif insn >> 16 & 7 == STAGE2_OP1 or insn & ~0x1F in (VMALLE1IS, VMALLE1):
            machine, vcpu = self.running_on(cpu)
            self.issue(machine, vcpu, insn, xt)
        else:
            self.session.skipped["TLBIs of stage 1 by address (L1's own and L2's)"] += 1

    def on_handler(self, machine: Machine, vcpu: int, insn: int, xt: int) -> None:
        """L0's handler of a TLBI of L1; with a CSV the instruction itself is there."""
        if not self.has_table and insn >> 16 & 7 == STAGE2_OP1:
            self.issue(machine, vcpu, insn, xt)

    def issue(self, machine: Machine, vcpu: int, insn: int, xt: int) -> None:
        from s2shadow.tlbi import UndefinedInstruction

        vttbr, vtcr = machine.registers[vcpu]
        if not self.has_table:
            vttbr, vtcr = 1 << 48 | self.made_up_root(machine), LINUX_VTCR
        try:
            machine.lanes.tlbi(vcpu, insn, xt, (vttbr, vtcr, machine.hcr[vcpu] & ~(1 << 27)))
        except UndefinedInstruction:
            self.session.skipped["TLBIs that this machine does not have"] += 1
            return
        self.session.tlbis += 1

    # --- the host side

    def on_map(self, machine: Machine, vcpu: int, root: int, start: int, end: int, pa: int, perm: int) -> None:
        """L0 maps: into its own table, or (its answer to a fault of L2, looked at there) into a shadow."""
        own = root == self.host_root if self.host_root is not None else machine.inside[vcpu] is None
        if own and 0 < end - start <= LARGEST_MAP and not (start | end | pa) & (PAGE - 1) and in_reach(pa):
            machine.backing.put(start, end - start, pa, perm)
            self.session.applied["maps of L0's own table"] += 1

    def on_unmap(self, pid: int, root: int, start: int, end: int) -> None:
        """What Linux did for a notifier: each step over a shadow, counted on the change that it is for."""
        if pid == self.change_pid and self.last_change is not None and self.is_shadow(root) and end - start == BIG_STEP:
            self.last_change["linux_unmaps"] = self.last_change.get("linux_unmaps", 0) + 1

    def on_notifier(self, kind: int, cpu: int, pid: int, time: int, start: int, end: int, value: int) -> None:
        if self.session.is_repeated(kind == UNMAP_HVA, cpu, start, end):
            return
        self.session.applied["MMU notifiers"] += 1
        event = MN_EVENTS[value] if kind == MN_START and value < len(MN_EVENTS) else "UNMAP"
        self.has_notifier_probe = self.has_notifier_probe or len(self.slots) > 0
        for vm, low, high in self.slots.lookup(*whole_pages(start, end), time):
            self.unmap(self.numbered(vm), pid, time, low, high, event)

    def on_gfn_unmap(self, pid: int, time: int, start: int, end: int) -> None:
        """The same, past the memory slots: used where those are not known."""
        if not self.has_notifier_probe:
            self.unmap(self.numbered(0), pid, time, start, end, "UNMAP")

    def unmap(self, machine: Machine, pid: int, time: int, start: int, end: int, event: str) -> None:
        if not in_reach(start, end):
            self.session.skipped["host changes beyond L1's memory"] += 1
            return
        self.add_left_out(self.line)
        machine.backing.remove(start, end)
        done = machine.lanes.unmap(start, end)
        self.last_change = self.session.changed(time, start, end, event, done)
        self.change_pid, self.change_line = pid, self.line

    def add_left_out(self, until: int) -> None:
        """A trace that was made smaller keeps the first of the unmap calls, and says how many more there were."""
        if self.last_change is not None and self.last_change.get("linux_unmaps"):
            more = (count for line, name, count in self.session.left_out
                    if name == "unmap" and self.change_line < line < until)
            self.last_change["linux_unmaps"] += next(more, 0)
        self.last_change = None

    def on_age(self, root: int, start: int, end: int, flags: int) -> None:
        self.has_age = True
        if root == self.host_root or self.host_root is None:
            self.age(self.numbered(0), start, end, bool(flags & 1))

    def on_age_hva(self, kind: int, time: int, start: int, end: int) -> None:
        if not self.has_age:
            for vm, low, high in self.slots.lookup(*whole_pages(start, max(end, start + 1)), time):
                self.age(self.numbered(vm), low, high, kind == AGE_HVA)

    def age(self, machine: Machine, start: int, end: int, clear: bool) -> None:
        if not in_reach(start, end):
            return
        for lane in machine.lanes.lanes:
            (lane.vm.age if clear else lane.vm.test_young)(start, end)
        self.session.applied["aging" if clear else "tests of the access flag"] += 1

    def on_wrprotect(self, root: int, start: int, end: int) -> None:
        """L0 write-protects its own table: dirty logging begins, or the log is read and protected again."""
        if (root != self.host_root and self.host_root is not None) or not in_reach(start, end):
            return
        machine = self.numbered(0)
        known = any(low <= start and end <= high for low, high in machine.logged)
        for lane in machine.lanes.lanes:
            if known:
                lane.vm.dirty_log(start, end)
            else:
                lane.vm.log_dirty(start, end)
        if not known:
            machine.logged.append((start, end))
        self.session.applied["dirty logs read" if known else "dirty logging switched"] += 1

    def on_memslot(self, pid: int, time: int, start: int, end: int, flags: int, hva: int) -> None:
        """A slot of L1 appears, or goes (its pages with it); dirty logging is one of its flags."""
        from s2shadow.memslots import Memslot

        machine = self.numbered(0)
        if not in_reach(start, end) or hva & (PAGE - 1):
            return
        if start == end:
            for slot in [slot for slot in self.slots.slots if slot.gpa == start and slot.until > time]:
                self.unmap(machine, pid, time, slot.gpa, slot.gpa + slot.size, "MEMSLOT")
            return
        if not any(slot.gpa == start and slot.hva == hva for slot in self.slots.slots):
            self.slots = self.slots + type(self.slots)([Memslot(start, hva, end - start, 0, time)])
        logging = (start, end) in machine.logged
        if bool(flags & LOG_DIRTY) != logging:
            for lane in machine.lanes.lanes:
                lane.vm.log_dirty(start, end, on=not logging)
            (machine.logged.remove if logging else machine.logged.append)((start, end))
            self.session.applied["dirty logging switched"] += 1

    # --- snapshots and the end

    def pass_snapshot(self, snapshot: Snapshot) -> None:
        self.snapshots.remove(snapshot)
        self.compare(snapshot)
        self.take_snapshot(snapshot)

    def take_snapshot(self, snapshot: Snapshot, only_guest: bool = False) -> None:
        """L1's tables and L0's are those of the snapshot from now on."""
        machine = self.numbered(0)
        addresses, pages = snapshot.guest_pages()
        for address in set(machine.table_pages) - set(addresses.tolist()):
            machine.mem.write(address, bytes(PAGE))
        for address, page in zip(addresses.tolist(), pages, strict=True):
            machine.ram.cover(address, len(page))
            machine.mem.write(address, page)
        machine.table_pages = addresses.tolist()
        machine.tables.clear()
        capture, leaves = snapshot.guest()
        for vm in capture.vms:
            regs = (vm.vttbr, vm.vtcr, vm.hcr)
            for leaf in leaves[vm.baddr]:
                machine.ram.cover(int(leaf["pa"]), int(leaf["size"]))
            machine.table(regs)
            self.invalidate(machine, regs, machine.leaves.get(vm.baddr), leaves[vm.baddr])
        machine.leaves = leaves
        machine.touched.clear()
        if not only_guest:
            host, host_leaves = snapshot.host()
            if host.host is not None:
                self.host_root = host.host.vttbr & BADDR
                for leaf in host_leaves[self.host_root]:
                    machine.backing.put(int(leaf["ipa"]), int(leaf["size"]), int(leaf["pa"]), int(leaf["perm"]))

    @staticmethod
    def invalidate(machine: Machine, regs: Registers, old: Events | None, new: Events) -> None:
        """What L1 changed since the last snapshot it has invalidated since; the engines are told, uncounted."""
        if old is None:
            return
        keep = np.isin(old["ipa"], new["ipa"])
        at = np.searchsorted(new["ipa"], old["ipa"][keep])
        keep[keep] = ((new["pa"][at] == old["pa"][keep]) & (new["size"][at] == old["size"][keep])
                      & (old["perm"][keep] & ~new["perm"][at] == 0))
        gone = old["ipa"][~keep].tolist()
        for lane in machine.lanes.lanes:
            issue = lane.vcpus[0].tlbi
            if len(gone) > MANY_CHANGES:
                issue(VMALLS12E1IS, 0, *regs)
            else:
                for ipa in gone:
                    issue(IPAS2E1IS, ipa >> 12, *regs)

    def compare(self, snapshot: Snapshot) -> None:
        """Against what the real L0 had: its own table, and its shadows where L2 faulted since the last snapshot."""
        machine = self.numbered(0)
        capture, leaves = snapshot.host()
        if capture.host is not None:
            theirs = leaves[capture.host.vttbr & BADDR]
            self.session.checks["hosts"].append({"snapshot": snapshot.name, **compare_backing(machine.backing, theirs)})
        for nested in capture.nested:
            pages = np.array(sorted(machine.touched.get(nested.l1_vttbr & BADDR, ())), np.uint64)
            regs = (nested.l1_vttbr, nested.l1_vtcr, HCR)
            found = compare_shadow(machine, regs, pages, leaves[nested.shadow_vttbr & BADDR])
            self.session.checks["shadows"].append({"snapshot": snapshot.name, "vm": nested.vm, **found})

    def finish(self) -> None:
        for snapshot in self.snapshots:         # taken right after the last row
            if snapshot.seq is not None and snapshot.seq <= self.last_seq:
                self.compare(snapshot)
        self.add_left_out(1 << 64)

    def compare_policies(self) -> None:
        """What one policy maps the others must map alike."""
        for machine in self.machines.values():
            self.session.checks["same_mapping"].append(machine.lanes.agreement(lambda *regs: True))

    def applied(self) -> dict[str, int]:
        """What was done so far, in words."""
        names = {"l2": "faults of L2", "entries": "entries into L2", "as recorded": "faults of L2 answered as recorded",
                 "otherwise": "faults of L2 answered otherwise", "unanswered": "faults of L2 that the host retried"}
        return {text: self.counts[name] for name, text in names.items()}


def in_reach(start: int, end: int | None = None) -> bool:
    """Whether a trace's address, or range of pages, is one that L1's memory can have."""
    if end is None:
        return start >> PA_BITS == 0
    return not (start | end) & (PAGE - 1) and start <= end <= 1 << PA_BITS and end - start <= LARGEST_CHANGE


def as_recorded(kind: int, access: int, answer: Any) -> bool:
    """Whether the engine answered as L0 did. For a write to what L1 maps read-only Linux first installs the leaf
    without W, and passes the fault on when it comes again; the engine passes it on at once."""
    if int(answer["kind"]) == INJECT_FAULT:
        return kind == L1_FAULT
    return kind in (MAPPED, HIT) if not access & WRITE or int(answer["access"]) & WRITE else kind == L1_FAULT


def compare_backing(backing: Backing, theirs: Events) -> dict[str, int]:
    """L0's own table as replayed and as captured, in 4 KiB pages."""
    pages, pas = in_pages(theirs)
    mine, outputs = backing.pages()
    target = lookup(mine, pages, pas)
    common = target != ABSENT
    same = int(np.count_nonzero(common & (target == outputs)))
    return {"pages": len(pages), "same": same, "other_pa": int(np.count_nonzero(common)) - same,
            "only_replay": int(np.count_nonzero(~common)), "only_tables": len(pages) - int(np.count_nonzero(common)),
            "leaves": len(theirs), "equal_leaves": len(theirs)}


def compare_shadow(machine: Machine, regs: Registers, pages: npt.NDArray[np.uint64], theirs: Events) -> dict[str, int]:
    """The reference's shadow leaves of ``pages`` against the captured shadow, for the pages that this one maps."""
    at = np.searchsorted(theirs["ipa"], pages, side="right").astype(np.int64) - 1
    held = at >= 0
    held[held] = pages[held] < theirs["ipa"][at[held]] + theirs["size"][at[held]]
    pages, leaves = pages[held], theirs[at[held]]
    own = {(context.vttbr & BADDR, context.vtcr): context.index for context in machine.lanes.reference.vm.contexts
           if context.enabled}
    index = own.get((regs[0] & BADDR, regs[1]))
    mine = theirs[:0] if index is None else machine.lanes.reference.vm.shadow(index)
    where = np.searchsorted(mine["ipa"], pages, side="right").astype(np.int64) - 1
    live = where >= 0
    live[live] = pages[live] < mine["ipa"][where[live]] + mine["size"][where[live]]
    found, wanted = mine[where[live]], leaves[live]
    same_pa = found["pa"] - found["ipa"] == wanted["pa"] - wanted["ipa"]
    equal = same_pa & (found["size"] == wanted["size"]) & (found["perm"] == wanted["perm"])
    return {"pages": len(pages), "same": int(np.count_nonzero(same_pa)), "other_pa": int(np.count_nonzero(~same_pa)),
            "only_replay": 0, "only_tables": int(np.count_nonzero(~live)), "leaves": int(np.count_nonzero(live)),
            "equal_leaves": int(np.count_nonzero(equal)),
            "other_size": int(np.count_nonzero(same_pa & (found["size"] != wanted["size"]))),
            "other_perm": int(np.count_nonzero(same_pa & (found["perm"] != wanted["perm"])))}
