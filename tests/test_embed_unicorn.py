"""``s2shadow.embed.unicorn``: real arm64 code as L2, with the engine under it.

Programs are words with their source beside them. ``Machine`` has L1's RAM at PA = cIPA + OFFSET, code of L2 at IPA
CODE, and a pool of physical pages beside it.
"""

import ctypes
import gc
import mmap
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest

import examples
import s2shadow as s2
from rig import Tables

pytest.importorskip("unicorn", reason="no Unicorn here (extra 'unicorn')")
from unicorn import UC_ARCH_ARM64, UC_ARCH_X86, UC_HOOK_BLOCK, UC_HOOK_MEM_WRITE, UC_MODE_64, UC_MODE_ARM, Uc, UcError
from unicorn import arm64_const as arm64

from s2shadow.embed import unicorn as embed
from s2shadow.embed.unicorn import Exit

M, PAGE = 1 << 20, 4096
RAM, RAM_SIZE, ROM, DEVICE = 0x4000_0000, 16 * M, 0x6000_0000, 0x900_0000
TABLES, DATA = RAM + 8 * M, RAM + 4 * M
OFFSET = 0x10_0000_0000
POOL, POOL_PAGES = 0x20_0000_0000, 64
CODE, HERE = 0x1000, 0x20_0000  # IPAs: of the program, and of the page that most tests are about
X = [getattr(arm64, f"UC_ARM64_REG_X{n}") for n in range(8)]

LOAD = 0xF9400001  # ldr x1, [x0]
STORE = 0xF9000001  # str x1, [x0]
COUNT = 0x91000463  # add x3, x3, #1
NOP = 0xD503201F


def tlbi(op1, crm, op2, rt=5, crn=8):
    return 0xD5080000 | op1 << 16 | crn << 12 | crm << 8 | op2 << 5 | rt


def branch(words):
    """b, so many words further."""
    return 0x14000000 | words & 0x3FFFFFF


class Machine:
    def __init__(self, vcpus=1, features=None, **options):
        self.mem = s2.GuestMemory()
        self.mem.add(RAM, RAM_SIZE)
        self.mem.add(ROM, buffer=bytearray(PAGE), readonly=True)
        self.mem.add(DEVICE, PAGE, device=True)
        vm_options = {key: options.pop(key) for key in ("max_table_bytes", "track_tlbis") if key in options}
        self.vm = s2.NestedVM(self.mem, vcpus=vcpus, features=features, **vm_options)
        self.vm.host.populate = s2.Linear(OFFSET)
        self.tables = Tables(self.mem.read64, self.mem.write64, TABLES)
        self.tables.map(CODE, RAM)
        self.pool = np.zeros(POOL_PAGES * PAGE // 8, dtype=np.uint64)
        self.cpus = [self.attach(n, **options) for n in range(vcpus)]
        self.cpu = self.cpus[0]
        self.uc = self.cpu.uc

    def attach(self, n, **options):
        cpu = embed.attach(new_uc(), self.vm, n, **options)
        cpu.map_memory(OFFSET)
        cpu.map_ram(POOL, self.pool)
        cpu.vcpu.load(self.tables.vttbr(1), self.tables.vtcr)
        return cpu

    def program(self, *words):
        """Writes the program, while nothing runs; returns the address of its end."""
        code = np.array(words, dtype=np.uint32).tobytes()
        if self.mem.read(RAM, len(code)) != code:
            self.mem.write(RAM, code)
            for cpu in self.cpus:
                cpu.uc.ctl_flush_tb()  # what was translated of the last one
        return CODE + 4 * len(words)

    def run(self, *words, **registers):
        """One run of a program on CPU 0 with these registers; returns x1."""
        end = self.program(*words)
        self.set(**registers)
        assert self.cpu.run(CODE, end) == Exit.DONE
        return self.x(1)

    def set(self, n=0, **registers):
        for name, value in registers.items():
            self.cpus[n].uc.reg_write(getattr(arm64, f"UC_ARM64_REG_{name.upper()}"), value)

    def x(self, n, cpu=0):
        return self.cpus[cpu].uc.reg_read(X[n])

    @property
    def pc(self):
        return self.uc.reg_read(arm64.UC_ARM64_REG_PC)


def new_uc():
    return Uc(UC_ARCH_ARM64, UC_MODE_ARM, cpu=arm64.UC_CPU_ARM64_A72)


@pytest.fixture
def machine():
    machine = Machine()
    yield machine
    machine.vm.check()
    machine.cpu.detach()


# --- memory ---


def test_loads_and_stores_reach_the_memory_of_l1(machine):
    machine.tables.map(HERE, DATA)
    machine.mem.write64(DATA + 8, 41)
    # ldr x1, [x0, 8]; add x1, x1, #1; str x1, [x0, 16]
    assert machine.run(0xF9400401, 0x91000421, 0xF9000801, x0=HERE) == 42
    assert machine.mem.read64(DATA + 16) == 42
    leaf = machine.vm.vcpus[0].translate(HERE, s2.WRITE)
    assert leaf.kind == s2.HIT and leaf.pa == DATA + OFFSET
    assert machine.cpu.counters.fills == 2  # code, and data: a fill for a read brings W along


def test_a_fill_is_a_page_however_large_the_leaf(machine):
    machine.tables.map(4 * M, DATA, level=2)
    for page in range(4):
        machine.mem.write64(DATA + PAGE * page, 100 + page)
        assert machine.run(LOAD, x0=4 * M + PAGE * page) == 100 + page
    assert machine.cpu.counters.fills == 1 + 4
    assert machine.vm.shadow(0)["size"].max() == 2 * M


def test_an_access_over_two_pages(machine):
    machine.tables.map(HERE, DATA + PAGE)
    machine.tables.map(HERE + PAGE, DATA)
    machine.run(STORE, x0=HERE + PAGE - 4, x1=0x1122_3344_5566_7788)
    assert machine.mem.read(DATA + 2 * PAGE - 4, 4) == bytes([0x88, 0x77, 0x66, 0x55])
    assert machine.mem.read(DATA, 4) == bytes([0x44, 0x33, 0x22, 0x11])


def test_a_unicorn_that_is_set_up_already_keeps_its_small_pages():
    uc = new_uc()
    uc.mem_map(0, PAGE)  # sets it up, with pages of 1 KiB
    machine = Machine()
    cpu = embed.attach(uc, machine.vm)
    machine.cpu.detach()
    cpu.map_memory(OFFSET)
    machine.tables.map(HERE, DATA)
    machine.mem.write64(DATA + 3 * 1024, 7)
    machine.mem.write(RAM, LOAD.to_bytes(4, "little"))
    uc.reg_write(X[0], HERE + 3 * 1024)
    assert cpu.run(CODE, CODE + 4) == Exit.DONE and uc.reg_read(X[1]) == 7


@pytest.mark.parametrize("granule", [16384, 65536])
def test_other_granules(granule):
    features = s2.Features(granules=(granule,), host_granule=granule)
    mem = s2.GuestMemory()
    mem.add(RAM, RAM_SIZE)
    vm = s2.NestedVM(mem, features=features)
    vm.host.populate = s2.Linear(OFFSET)
    tables = Tables(mem.read64, mem.write64, TABLES, granule)
    tables.map(0, RAM)
    tables.map(16 * granule, DATA)
    mem.write(RAM, LOAD.to_bytes(4, "little"))
    mem.write64(DATA + granule - 8, 9)
    cpu = embed.attach(new_uc(), vm)
    cpu.map_memory(OFFSET)
    vm.vcpus[0].load(tables.vttbr(1), tables.vtcr)
    cpu.uc.reg_write(X[0], 17 * granule - 8)
    assert cpu.run(0, 4) == Exit.DONE and cpu.uc.reg_read(X[1]) == 9
    assert cpu.uc.ctl_get_page_size() == granule


# --- L1's faults ---


def test_l1_mends_its_table_and_the_access_is_tried_again(machine):
    aborts = []

    def handler(abort):
        aborts.append(abort)
        machine.tables.map(abort.ipa, DATA)
        return True

    machine.cpu.on_l1_fault = handler
    machine.mem.write64(DATA + 0x128, 5)
    assert machine.run(COUNT, LOAD, COUNT, x0=HERE + 0x128, x3=0) == 5
    assert machine.x(3) == 2  # nothing ran twice
    (abort,) = aborts
    assert (abort.ipa, abort.far, abort.access, abort.pc) == (HERE, HERE, s2.READ, CODE + 4)
    assert abort.hpfar == HERE >> 12 << 4
    assert abort.esr == 0x24 << 26 | 1 << 25 | 0x06  # data abort from below, IL, read, translation fault of level 2


def test_a_store_to_a_read_only_page_and_a_fetch(machine):
    seen = []

    def handler(abort):
        seen.append((abort.esr >> 26, abort.esr & 0x7F, abort.pc))
        machine.tables.map(abort.ipa, DATA, perm="rw" if abort.ipa == HERE else "rx")
        return True

    machine.cpu.on_l1_fault = handler
    machine.tables.map(HERE, DATA, perm="r")
    machine.run(LOAD, STORE, x0=HERE)
    machine.mem.write(DATA + 0x10, b"".join(word.to_bytes(4, "little") for word in (COUNT, branch(-5))))
    machine.tables.map(HERE + PAGE, DATA, perm="rw")
    machine.set(x0=HERE + PAGE + 0x10, x3=0)
    machine.program(0xD61F0000)  # br x0
    assert machine.cpu.run(CODE, HERE + PAGE) == Exit.DONE
    assert machine.x(3) == 1
    permission = 0x0F
    assert seen == [(0x24, 1 << 6 | permission, CODE + 4), (0x20, permission, HERE + PAGE + 0x10)]


def test_a_fault_that_nobody_handles_can_be_taken_up_again(machine):
    end = machine.program(LOAD)
    machine.set(x0=HERE)
    with pytest.raises(embed.UnhandledFault, match=r"read at 0x200000 from pc 0x1000: Fault\(L1_FAULT") as caught:
        machine.cpu.run(CODE, end)
    assert caught.value.abort.fault.kind == s2.L1_FAULT
    machine.cpu.on_l1_fault = lambda abort: False
    with pytest.raises(embed.UnhandledFault):
        machine.cpu.run(None, end)
    machine.tables.map(HERE, DATA)
    assert machine.cpu.run(None, end) == Exit.DONE
    stats = machine.vm.stats
    assert stats.l1_faults == 2  # one for each attempt, however it was passed on


def test_what_a_handler_raises_comes_out_of_run(machine):
    machine.cpu.on_l1_fault = lambda abort: 1 // 0
    with pytest.raises(ZeroDivisionError):
        machine.run(LOAD, x0=HERE)
    machine.tables.map(HERE, DATA)
    machine.run(LOAD, x0=HERE)


def test_the_page_before_the_end_is_not_touched(machine):
    """Unicorn looks up the page before ``until`` when it leaves; L2 has not been there."""
    machine.cpu.on_l1_fault = lambda abort: pytest.fail(str(abort))
    machine.tables.map(HERE, RAM)
    machine.program(branch((HERE - CODE) // 4), NOP)
    assert machine.cpu.run(CODE, HERE) == Exit.DONE
    assert machine.cpu.run(CODE, HERE) == Exit.DONE
    assert machine.vm.vcpus[0].translate(HERE - PAGE, s2.EXEC).kind == s2.Kind.MISS


@pytest.mark.parametrize("el0", [False, True])
def test_execute_permission_of_either_level(el0):
    """FEAT_XNX: a page that only one of the two levels may execute."""
    machine = Machine()
    end = machine.program(COUNT)
    for perm, runs in (("rx", True), ("r", False), ("ru", el0), ("rp", not el0)):
        machine.tables.map(CODE, RAM, perm=perm)
        machine.vm.vcpus[0].tlbi("VMALLS12E1")
        machine.set(x3=0, pstate=0x3C0 if el0 else 0x3C5)
        machine.uc.cpr_write(3, 3, 13, 0, 2, 0)  # TPIDR_EL0: what Unicorn keeps of PSTATE is renewed with it
        if runs:
            assert machine.cpu.run(CODE, end) == Exit.DONE and machine.x(3) == 1
        else:
            with pytest.raises(embed.UnhandledFault, match="fetch at 0x1000"):
                machine.cpu.run(CODE, end)


# --- the host ---


def test_populate_is_asked_and_its_exceptions_pass(machine):
    asked = []

    def populate(cipa, access):
        asked.append((cipa, access))
        if len(asked) == 1:
            raise OSError("no page today")
        return s2.HostMapping(POOL + 5 * PAGE, PAGE)

    machine.tables.map(HERE, DATA)
    machine.run(NOP)  # the code's page
    machine.vm.host.populate = populate
    with pytest.raises(OSError, match="no page today"):
        machine.run(STORE, x0=HERE, x1=77)
    machine.run(STORE, x0=HERE, x1=77)
    assert asked == [(DATA, s2.WRITE)] * 2
    assert machine.pool[5 * PAGE // 8] == 77 and machine.mem.read64(DATA) == 0


@pytest.mark.parametrize("track", [True, False])
def test_populate_that_takes_another_page(track):
    """The physical page of one goes to the other, with no thread but this one."""
    machine = Machine(track_tlbis=track)
    machine.tables.map(HERE, DATA)
    machine.tables.map(HERE + PAGE, DATA + PAGE)

    def populate(cipa, access):
        cipa &= -PAGE
        if cipa == RAM:
            return s2.HostMapping(RAM + OFFSET, PAGE)
        victim = 2 * DATA + PAGE - cipa
        machine.vm.unmap(victim, victim + PAGE)
        machine.pool[: PAGE // 8] = 1 if cipa == DATA else 2
        return s2.HostMapping(POOL, PAGE)

    machine.vm.host.populate = populate
    # ldr x1, [x0]; ldr x2, [x4]; ldr x1, [x0]
    assert machine.run(LOAD, 0xF9400082, LOAD, x0=HERE, x4=HERE + PAGE) == 1 and machine.x(2) == 2


def test_a_host_fault_that_nobody_populates(machine):
    machine.tables.map(HERE, DATA)
    machine.run(NOP)
    machine.vm.host.populate = None
    with pytest.raises(embed.UnhandledFault, match="HOST_FAULT"):
        machine.run(LOAD, x0=HERE)


def test_memory_that_unicorn_does_not_have(machine):
    machine.tables.map(HERE, DATA)
    machine.vm.host.map(DATA, 0x30_0000_0000, PAGE)
    with pytest.raises(UcError, match="READ_UNMAPPED"):
        machine.run(LOAD, x0=HERE)


def test_an_unmap_between_runs(machine):
    machine.tables.map(HERE, DATA)
    machine.mem.write64(DATA, 1)
    assert machine.run(LOAD, x0=HERE) == 1
    machine.vm.unmap(DATA, DATA + PAGE)  # no sync: the next run begins with one
    machine.pool[0] = 2
    machine.vm.host.map(DATA, POOL, PAGE)
    assert machine.run(LOAD, x0=HERE) == 2


def test_changes_that_do_not_concern_the_context_cost_it_nothing(machine):
    machine.tables.map(HERE, DATA)
    machine.run(LOAD, x0=HERE)
    before = machine.cpu.counters
    machine.vm.unmap(DATA + 16 * PAGE, DATA + 17 * PAGE)
    machine.run(LOAD, x0=HERE)
    assert machine.cpu.counters == before


def test_another_context(machine):
    other = Tables(machine.mem.read64, machine.mem.write64, TABLES + M)
    other.map(CODE, RAM)
    other.map(HERE, DATA + PAGE)
    machine.tables.map(HERE, DATA)
    machine.mem.write64(DATA, 1)
    machine.mem.write64(DATA + PAGE, 2)
    assert machine.run(LOAD, x0=HERE) == 1
    machine.vm.vcpus[0].load(other.vttbr(2), other.vtcr)
    assert machine.run(LOAD, x0=HERE) == 2
    machine.vm.vcpus[0].load(machine.tables.vttbr(1), machine.tables.vtcr)
    assert machine.run(LOAD, x0=HERE) == 1


def spinning(machine, cpu, words, **registers):
    """Starts a program on a CPU in a thread of its own; returns the thread and the list that gets its exit."""
    end = machine.program(*words)
    machine.set(cpu.vcpu.index, **registers)
    result = []

    def body():
        try:
            result.append(cpu.run(CODE, end))
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    return thread, result


# ldr x1, [x0]; add x3, x3, #1; cmp x1, x2; b.eq to the start: ends when the page holds something else
WATCH = [LOAD, COUNT, 0xEB02003F, 0x54FFFFA0]


@pytest.mark.parametrize("track", [True, False])
def test_a_page_that_was_taken_is_out_of_reach(track):
    """L2 reads a page over and over. Each time it is taken, another owner overwrites it: L2 must never see that."""
    machine = Machine(track_tlbis=track)
    good = 0x600D
    lock = threading.Lock()
    place = [0]
    machine.pool[:] = good

    def populate(cipa, _access):
        if cipa & -PAGE != DATA:
            return s2.HostMapping((cipa & -PAGE) + OFFSET, PAGE)
        with lock:
            return s2.HostMapping(POOL + PAGE * place[0], PAGE)

    machine.vm.host.populate = populate
    machine.tables.map(HERE, DATA)
    thread, result = spinning(machine, machine.cpu, WATCH, x0=HERE, x2=good, x3=0)
    words = PAGE // 8
    for event in range(400):
        with lock:
            machine.vm.unmap(DATA, DATA + PAGE)
            machine.cpu.sync()
            old = place[0]
            place[0] = (old + 1) % POOL_PAGES
            machine.pool[place[0] * words : (place[0] + 1) * words] = good
            machine.pool[old * words : (old + 1) * words] = 0xBAD0000 + event
        if event % 4 == 0:
            threading.Event().wait(0.001)
    machine.cpu.stop()
    thread.join()
    assert result == [Exit.STOPPED], f"x1 = {machine.x(1):#x}"
    assert machine.x(3) > 0 and machine.cpu.counters.interruptions > 20
    machine.vm.check()


def test_writes_under_dirty_logging_are_all_reported(machine):
    """L2 counts in eight pages; what it wrote after a sweep's sync shows in the next sweep."""
    pages = 8
    machine.tables.map_range(HERE, DATA, pages * PAGE)
    # x4 = x0: ldr x1, [x4]; add x1, x1, #1; str x1, [x4]; add x4, x4, #4096; cmp x4, x2; b.ne ldr; b to the start
    words = [0xAA0003E4, 0xF9400081, 0x91000421, 0xF9000081, 0x91400484, 0xEB02009F, 0x54FFFF61, branch(-7)]
    machine.vm.log_dirty(DATA, DATA + pages * PAGE)
    thread, result = spinning(machine, machine.cpu, words, x0=HERE, x2=HERE + pages * PAGE)
    copy = [0] * pages
    for _sweep in range(100):
        bits = machine.vm.dirty_log(DATA, DATA + pages * PAGE)
        machine.cpu.sync()
        for page in np.flatnonzero(np.unpackbits(bits, count=pages, bitorder="little")).tolist():
            copy[page] = machine.mem.read64(DATA + page * PAGE)
        threading.Event().wait(0.001)
    machine.cpu.stop()
    thread.join()
    assert result == [Exit.STOPPED]
    bits = machine.vm.dirty_log(DATA, DATA + pages * PAGE)
    for page in np.flatnonzero(np.unpackbits(bits, count=pages, bitorder="little")).tolist():
        copy[page] = machine.mem.read64(DATA + page * PAGE)
    assert copy == [machine.mem.read64(DATA + page * PAGE) for page in range(pages)]
    assert min(copy) > 0


def test_eviction_under_a_small_budget():
    """Leaf tables go while Unicorn still has entries of them; what L2 reads stays right, and so does what it writes."""
    machine = Machine(max_table_bytes=512 * 1024)
    count = 96
    for n in range(count):  # a leaf table of the shadow for each
        machine.tables.map(HERE + n * 2 * M, DATA + n * PAGE)
        machine.mem.write64(DATA + n * PAGE, n)
    # ldr x1, [x0]; add x1, x1, #1; str x1, [x0]; add x0, x0, #2 MiB; cmp x0, x2; b.ne to the start
    words = [LOAD, 0x91000421, STORE, 0x8B040000, 0xEB02001F, 0x54FFFF61]
    for _round in range(3):
        machine.run(*words, x0=HERE, x2=HERE + count * 2 * M, x4=2 * M)
    assert [machine.mem.read64(DATA + n * PAGE) for n in range(count)] == [n + 3 for n in range(count)]
    assert machine.vm.stats.evictions > 0
    machine.vm.check()


# --- TLBIs of the program ---

STAGE2_TLBIS = {
    "IPAS2E1IS": (tlbi(4, 0, 1), HERE >> 12),
    "IPAS2LE1IS": (tlbi(4, 0, 5), HERE >> 12),
    "IPAS2E1": (tlbi(4, 4, 1), HERE >> 12),
    "IPAS2E1OS": (tlbi(4, 4, 0), HERE >> 12),
    "IPAS2E1ISNXS": (tlbi(4, 0, 1, crn=9), HERE >> 12),
    "RIPAS2E1IS": (tlbi(4, 0, 2), HERE >> 12 | 1 << 46),
    "VMALLS12E1": (tlbi(4, 7, 6, rt=31), 0),
    "VMALLS12E1IS": (tlbi(4, 3, 6, rt=31), 0),
    "ALLE1IS": (tlbi(4, 3, 4, rt=31), 0),
}
# ldr x1, [x0]; str x6, [x7] (L1's descriptor); dsb ish; [TLBI]; dsb ish; isb; ldr x2, [x0]
AROUND = [LOAD, 0xF90000E6, 0xD5033B9F], [0xD5033B9F, 0xD5033FDF, 0xF9400002]


@pytest.fixture
def remapping(machine):
    """A program that, as L1, rewrites the descriptor of HERE in L1's own table, and says through x1 and x2 what it read
    there before and after."""
    machine.tables.map(HERE, DATA)
    table_ipa = 0x100_0000
    machine.tables.map_range(table_ipa, TABLES, M)
    machine.mem.write64(DATA, 1)
    machine.mem.write64(DATA + PAGE, 2)
    slot = machine.tables.slot(HERE, 3)
    new = machine.tables.leaf(DATA + PAGE, 3)

    def run(instruction, operand):
        machine.run(*AROUND[0], instruction, *AROUND[1], x0=HERE, x5=operand, x6=new, x7=table_ipa + slot - TABLES)
        return machine.x(1), machine.x(2)

    return run


@pytest.mark.parametrize("name", STAGE2_TLBIS)
def test_a_tlbi_of_l1_takes_what_it_names(machine, remapping, name):
    assert s2.decode_tlbi(STAGE2_TLBIS[name][0]).name == name
    assert remapping(*STAGE2_TLBIS[name]) == (1, 2)
    assert machine.cpu.counters.tlbis == 1
    assert sum(group.operations for group in machine.vm.stats.tlbis.values()) == 1


def test_without_a_tlbi_the_old_page_stays(machine, remapping):
    assert remapping(NOP, 0) == (1, 1)


def test_a_tlbi_under_other_registers_names_another_vmid(machine, remapping):
    machine.cpu.tlbi_registers = (machine.tables.vttbr(9), machine.tables.vtcr, s2.HCR_VM)
    assert remapping(*STAGE2_TLBIS["VMALLS12E1IS"]) == (1, 1)
    machine.cpu.tlbi_registers = None
    assert machine.run(STAGE2_TLBIS["VMALLS12E1IS"][0], LOAD, x0=HERE) == 2


def test_stage_1_tlbis_of_l2_are_its_own(machine, remapping):
    assert remapping(tlbi(0, 3, 1), HERE >> 12) == (1, 1) or machine.x(2) == 2
    counters = machine.cpu.counters
    assert (counters.tlbis, counters.flushes) == (0, 1)


@pytest.mark.parametrize("traps, word", [(False, STAGE2_TLBIS["IPAS2E1IS"][0]), (True, tlbi(4, 0, 7))])
def test_undefined_instructions(traps, word):
    machine = Machine(traps=traps)
    with pytest.raises(UcError, match="UC_ERR_EXCEPTION"):
        machine.run(word)


def test_a_tlbi_reaches_the_other_cpu():
    """CPU 1 watches the page while CPU 0, as L1, puts another one in its place."""
    machine = Machine(vcpus=2)
    machine.tables.map(HERE, DATA)
    machine.mem.write64(DATA, 1)
    machine.mem.write64(DATA + PAGE, 2)
    watcher = machine.cpus[1]
    thread, result = spinning(machine, watcher, WATCH, x0=HERE, x2=1, x3=0)
    while not watcher.counters.fills:
        threading.Event().wait(0.001)
    threading.Event().wait(0.01)
    machine.tables.map(HERE, DATA + PAGE)
    assert not result
    machine.tables.map(CODE + PAGE, RAM + PAGE)
    machine.mem.write(RAM + PAGE, tlbi(4, 0, 1).to_bytes(4, "little"))
    machine.set(x5=HERE >> 12)
    assert machine.cpu.run(CODE + PAGE, CODE + PAGE + 4) == Exit.DONE
    thread.join(10)
    assert result == [Exit.DONE] and machine.x(1, cpu=1) == 2


def test_cpus_that_shoot_at_each_other():
    """Both issue TLBIs all the time, and a third thread takes pages: nobody waits for ever."""
    machine = Machine(vcpus=2)
    machine.tables.map(HERE, DATA)
    machine.mem.write64(DATA, 1)
    words = [LOAD, tlbi(4, 0, 1), COUNT, 0xEB02007F, 0x54FFFF81]  # …; cmp x3, x2; b.ne to the start
    threads = [spinning(machine, cpu, words, x0=HERE, x2=3000, x3=0, x5=HERE >> 12) for cpu in machine.cpus]
    for _ in range(300):
        machine.cpu.unmap(DATA, DATA + PAGE)
    for thread, result in threads:
        thread.join(60)
        assert result == [Exit.DONE]
    assert [cpu.counters.tlbis for cpu in machine.cpus] == [3000, 3000]
    machine.vm.check()


# --- devices ---


def test_devices_are_read_and_written(machine):
    seen = []
    machine.cpu.device = lambda cipa, size, value: seen.append((cipa, size, value)) or 0x55
    machine.tables.map(HERE, DEVICE)
    # loop: ldrb w1, [x0, #3]; str w1, [x0, #8]; add x3, x3, #1; cmp x3, #10; b.ne loop
    assert machine.run(0x39400C01, 0xB9000801, COUNT, 0xF100287F, 0x54FFFF81, x0=HERE, x3=0) == 0x55
    assert seen == [(DEVICE + 3, 1, None), (DEVICE + 8, 4, 0x55)] * 10
    assert machine.vm.stats.mmio == 2  # one to read and one to write; Unicorn then knows the way


def test_a_device_page_that_l1_takes_away(machine):
    machine.cpu.device = lambda cipa, size, value: 0x55
    machine.tables.map(HERE, DEVICE)
    machine.mem.write64(DATA, 1)
    assert machine.run(0xB9400001, x0=HERE) == 0x55  # ldr w1, [x0]
    machine.tables.map(HERE, DATA)
    machine.vm.vcpus[0].tlbi("IPAS2E1IS", HERE >> 12)  # no leaf falls, and no row is owed
    assert machine.run(0xB9400001, x0=HERE) == 1


@pytest.mark.parametrize("second, accesses", [(0x39401002, ((0, 7), (4, None))), (0xB9000401, ((0, 7), (4, 7)))])
def test_more_device_pages_than_are_known_at_a_time(machine, second, accesses):
    """L1 has as many as there are addresses, since whatever is no region is a device's: each access goes to its own,
    and Unicorn gets no more of them."""
    seen, pages, nowhere = [], 3 * embed.DEVICE_SLOTS, 8 << 30
    machine.cpu.device = lambda cipa, size, value: seen.append((cipa, value)) or 0x55
    for page in range(pages):
        machine.tables.map(HERE + page * PAGE, nowhere + page * PAGE)
    # twice: mov x0, x5; mov x3, x6
    # loop: str w1, [x0]; ldrb w2, [x0, #4] or str w1, [x0, #4]; add x0, x0, #4096; subs x3, x3, #1; b.ne loop
    loop = [0xAA0503E0, 0xAA0603E3, 0xB9000001, second, 0x91400400, 0xF1000463, 0x54FFFF81]
    machine.run(*loop, 0xF10004E7, 0x54FFFF01, x1=7, x5=HERE, x6=pages, x7=2)     # subs x7, x7, #1; b.ne twice
    assert seen == [(nowhere + page * PAGE + at, value) for page in range(pages) for at, value in accesses] * 2
    assert len(list(machine.uc.mem_regions())) <= embed.DEVICE_SLOTS + 3


def test_a_slot_of_device_pages_is_another_page_now(machine):
    """What was granted to read stays with the page that it was granted for when its slot goes to a page written to."""
    seen, nowhere = [], 8 << 30
    machine.cpu.device = lambda cipa, size, value: seen.append((cipa, value)) or 0x55
    for page in range(embed.DEVICE_SLOTS + 1):
        machine.tables.map(HERE + page * PAGE, nowhere + page * PAGE)
    machine.run(0x39400001, x0=HERE)                # ldrb w1, [x0]
    for page in range(1, embed.DEVICE_SLOTS + 1):
        machine.run(0xB9000001, x0=HERE + page * PAGE, x1=7)    # str w1, [x0]
    seen.clear()
    machine.run(0x39400001, x0=HERE)
    assert seen == [(nowhere, None)]


@pytest.mark.parametrize("word", [0xA9400801, 0xA9000801, 0xB9400001])  # ldp, stp x1, x2, [x0]; ldr w1, [x0]
@pytest.mark.parametrize("asked", [False, True])
def test_one_access_to_two_device_pages(machine, word, asked):
    """Both are granted at once, also where a flush comes before each of the two answers."""
    seen, nowhere = [], 8 << 30
    machine.cpu.device = lambda cipa, size, value: seen.append(cipa) or 0x55
    if asked:
        machine.vm.host.populate = lambda cipa, access: s2.HostMapping((cipa & -PAGE) + OFFSET, PAGE)
    for page in range(2):
        machine.tables.map(HERE + page * PAGE, nowhere + page * PAGE)
    end = machine.program(word)
    machine.set(x0=HERE + PAGE - (2 if word == 0xB9400001 else 8), x1=1, x2=2)
    exits = []
    thread = threading.Thread(target=lambda: exits.append(machine.cpu.run(CODE, end)), daemon=True)
    thread.start()
    thread.join(20)
    assert exits == [Exit.DONE] and {cipa & -PAGE for cipa in seen} == {nowhere, nowhere + PAGE}


def test_a_device_that_is_taken_away(machine):
    machine.cpu.device = lambda cipa, size, value: 0x55
    machine.tables.map(HERE, DEVICE)
    machine.run(0x39400001, x0=HERE)
    machine.cpu.device = None
    with pytest.raises(RuntimeError, match="device was set to None, and L2 is at 0x9000000"):
        machine.run(0x39400001, x0=HERE)


def test_devices_that_stop_each_others_cpus():
    """As a register that powers all CPUs off does, written by two at once."""
    both = threading.Barrier(2)

    def device(cipa, size, value):
        both.wait(10)
        for cpu in machine.cpus:
            cpu.stop()
        return 1

    machine = Machine(vcpus=2, device=device)
    machine.tables.map(HERE, DEVICE)
    threads = [spinning(machine, cpu, [0x39400001, branch(0)], x0=HERE) for cpu in machine.cpus]
    for thread, result in threads:
        thread.join(20)
        assert result == [Exit.STOPPED]


def test_a_write_to_rom_is_a_devices(machine):
    seen = []
    machine.cpu.device = lambda cipa, size, value: seen.append((cipa, size, value))
    machine.tables.map(HERE, ROM)
    assert machine.run(0xB9000001, 0xB9400001, x0=HERE, x1=9) == 0  # str w1, [x0]; ldr w1, [x0]
    assert seen == [(ROM, 4, 9)]


def test_device_errors(machine):
    machine.tables.map(HERE, DEVICE)
    with pytest.raises(embed.UnhandledFault, match="MMIO"):
        machine.run(LOAD, x0=HERE)
    machine.cpu.device = lambda cipa, size, value: 1 // 0
    with pytest.raises(ZeroDivisionError):
        machine.run(LOAD, x0=HERE)
    machine.cpu.device = lambda cipa, size, value: None
    with pytest.raises(TypeError, match="returned None for a read at 0x9000000"):
        machine.run(LOAD, x0=HERE)
    machine.set(x0=HERE)
    end = machine.program(0xD61F0000)  # br x0
    with pytest.raises(embed.UnhandledFault, match="fetch"):
        machine.cpu.run(CODE, end)


def test_a_device_may_wait_for_who_waits_for_the_cpu(machine):
    """The host holds a lock over unmap and sync that the device wants too."""
    lock, inside = threading.Lock(), threading.Event()

    def device(cipa, size, value):
        inside.set()
        with lock:
            return 1

    machine.cpu.device = device
    machine.tables.map(HERE, DATA)
    machine.tables.map(HERE + PAGE, DEVICE)
    machine.mem.write64(DATA, 1)
    machine.pool[0] = 2
    with lock:
        # ldr x1, [x0]; ldr w2, [x4]; ldr x1, [x0]
        thread, result = spinning(machine, machine.cpu, [LOAD, 0xB9400082, LOAD], x0=HERE, x4=HERE + PAGE)
        assert inside.wait(10)
        machine.cpu.unmap(DATA, DATA + PAGE)
        machine.vm.host.map(DATA, POOL, PAGE)
    thread.join(10)
    assert result == [Exit.DONE] and machine.x(1) == 2


# --- running and stopping ---


def test_stop_and_go_on(machine):
    thread, result = spinning(machine, machine.cpu, [COUNT, branch(-1)], x3=0)
    while not machine.cpu.counters.fills:
        threading.Event().wait(0.001)
    machine.cpu.stop()
    thread.join()
    assert result == [Exit.STOPPED]
    machine.cpu.stop()  # nothing runs: nothing happens, and the next run is not stopped either
    machine.run(NOP)


def test_stop_where_the_next_run_begins_at_once(machine):
    """The run that was stopped has ended; who stopped it does not wait for another that nobody asked to stop."""
    machine.program(COUNT, branch(-1))
    runs, enough = [], threading.Event()

    def body():
        while not enough.is_set():
            runs.append(machine.cpu.run(CODE))

    def stop():
        for _ in range(50):
            machine.cpu.stop()
        stopped.set()

    stopped = threading.Event()
    runner, stopper = (threading.Thread(target=target, daemon=True) for target in (body, stop))
    runner.start()
    while not machine.cpu.counters.fills:
        threading.Event().wait(0.001)
    stopper.start()
    assert stopped.wait(20)
    enough.set()
    while runner.is_alive():
        machine.cpu.stop()
        runner.join(0.01)
    assert set(runs) == {Exit.STOPPED}


def test_a_run_without_an_end_does_not_end_at_0(machine):
    machine.tables.map(0, DATA)
    machine.mem.write(DATA, b"".join(word.to_bytes(4, "little") for word in (COUNT, 0xD503207F)))  # …; wfi
    machine.program(0xD61F0000)  # br x0
    machine.set(x0=0, x3=0)
    assert machine.cpu.run(CODE) == Exit.HALTED and machine.x(3) == 1


@pytest.mark.parametrize("until", [0, CODE + 0x100])
def test_an_address_where_no_instruction_is(machine, until):
    machine.program(0xD61F0000)  # br x0
    machine.set(x0=1)
    machine.tables.map(0, DATA)
    for _ in range(2):
        with pytest.raises(UcError):
            machine.cpu.run(CODE, until)


def test_stop_from_a_handler_and_from_a_hook(machine):
    def handler(abort):
        machine.tables.map(abort.ipa, DATA)
        machine.cpu.stop()
        return True

    machine.cpu.on_l1_fault = handler
    end = machine.program(LOAD, COUNT)
    machine.set(x0=HERE, x3=0)
    assert machine.cpu.run(CODE, end) == Exit.STOPPED and machine.pc == CODE
    assert machine.cpu.run(None, end) == Exit.DONE
    machine.uc.hook_add(UC_HOOK_BLOCK, lambda *_: machine.cpu.stop())
    machine.program(COUNT, branch(-1))
    assert machine.cpu.run(CODE) == Exit.STOPPED


def test_stop_amid_tlbis():
    machine = Machine(vcpus=2)
    for _ in range(20):
        words = [tlbi(4, 0, 1), COUNT, branch(-2)]
        threads = [spinning(machine, cpu, words, x3=0, x5=HERE >> 12) for cpu in machine.cpus]
        threading.Event().wait(0.002)
        for cpu, (thread, result) in zip(machine.cpus, threads, strict=True):
            while not result:
                cpu.stop()
            thread.join()
            assert result == [Exit.STOPPED]


def test_what_a_hook_raises_comes_out_of_run(machine):
    machine.uc.hook_add(UC_HOOK_BLOCK, lambda *_: 1 // 0)
    machine.program(COUNT, branch(-1))
    with pytest.raises(ZeroDivisionError):
        machine.cpu.run(CODE)


def test_a_hook_may_sync(machine):
    """From inside emulation, where waiting for this very CPU would be waiting for ever: its next block sees it."""
    machine.tables.map(HERE, DATA)
    machine.pool[0], calls = 2, []

    def hook(*_):
        calls.append(machine.vm.stats.removed)
        if len(calls) == 2:
            machine.cpu.unmap(DATA, DATA + PAGE)
            machine.vm.host.map(DATA, POOL, PAGE)

    machine.mem.write64(DATA, 1)
    machine.uc.hook_add(UC_HOOK_BLOCK, hook)
    assert machine.run(LOAD, branch(1), NOP, branch(1), 0xF9400002, x0=HERE) == 1  # …; ldr x2, [x0]
    assert machine.x(2) == 2


@pytest.mark.parametrize("call", ["flush", "sync", "unmap"])
def test_a_hook_of_stores_may_flush(machine, call):
    """Unicorn has looked up where the store goes, and would go on with what a flush leaves: the IPA itself, as an
    address of this process."""
    private = mmap.mmap(-1, PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(private))
    tables = Tables(machine.mem.read64, machine.mem.write64, TABLES + M, start=0)
    tables.map(CODE, RAM)
    tables.map(address, DATA)
    tables.map(HERE, DATA + PAGE)
    machine.vm.vcpus[0].load(tables.vttbr(1), tables.vtcr)

    def hook(*_):
        machine.vm.unmap(DATA + PAGE, DATA + 2 * PAGE)
        machine.cpu.unmap(DATA, DATA + PAGE) if call == "unmap" else getattr(machine.cpu, call)()

    machine.uc.hook_add(UC_HOOK_MEM_WRITE, hook)
    # ldr x2, [x4]; str x1, [x0, #8]; b to the next; str x1, [x0, #16]
    machine.run(0xF9400082, 0xF9000401, branch(1), 0xF9000801, x0=address, x1=0x41, x4=HERE)
    assert private[:] == bytes(PAGE)
    assert [machine.mem.read64(DATA + at) for at in (0, 8, 16)] == [0, 0x41, 0x41]


def test_who_takes_a_page_waits_for_the_rest_of_a_block():
    """A CPU whose hook waits here will go on with the block that it is in: its pages are out of reach after that."""
    machine = Machine(vcpus=2)
    waiting, other = machine.cpus
    other.vcpu.load(machine.tables.vttbr(2), machine.tables.vtcr)   # what goes from one context is not the other's
    machine.tables.map(HERE, DATA)
    machine.program(LOAD, branch(1), LOAD, branch(1), NOP, branch(0))
    machine.set(x0=HERE)
    inside, release, in_hook, done = (threading.Event() for _ in range(4))
    blocks = []

    def hook_of_other(*_):
        inside.set()
        release.wait(20)

    def hook(*_):
        blocks.append(done.is_set())
        if len(blocks) == 2:
            in_hook.set()
            other.stop()

    def take():
        waiting.unmap(DATA, DATA + PAGE)
        done.set()

    other.uc.hook_add(UC_HOOK_BLOCK, hook_of_other)
    waiting.uc.hook_add(UC_HOOK_BLOCK, hook)
    threads = [threading.Thread(target=target, daemon=True) for target in
               (lambda: other.run(CODE + 16), lambda: waiting.run(CODE, CODE + 16), take)]
    threads[0].start()
    assert inside.wait(20)
    threads[1].start()
    assert in_hook.wait(20)
    threads[2].start()
    assert not done.wait(0.3)
    release.set()
    for thread in threads:
        thread.join(20)
    assert done.is_set() and blocks[:2] == [False, False]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_cpu_that_a_hook_of_another_runs(order):
    machine = Machine(vcpus=2)
    outer, inner = (machine.cpus[n] for n in order)
    machine.program(NOP, branch(2), tlbi(4, 0, 1), NOP)
    exits = []

    def hook(*_):
        if not exits:
            exits.append(inner.run(CODE + 8, CODE + 12))

    outer.uc.hook_add(UC_HOOK_BLOCK, hook)
    thread = threading.Thread(target=lambda: exits.append(outer.run(CODE, CODE + 12)), daemon=True)
    thread.start()
    thread.join(20)
    assert exits == [Exit.DONE, Exit.DONE]


def test_a_cpu_that_halts(machine):
    end = machine.program(0xD503207F, COUNT)  # wfi
    machine.set(x3=0)
    assert machine.cpu.run(CODE, end) == Exit.HALTED
    assert machine.cpu.run(CODE + 4, end) == Exit.DONE and machine.x(3) == 1


def test_stage_1_is_refused(machine):
    words = [0xD5381001, 0xB2400021, 0xD5181001, NOP]  # mrs x1, sctlr_el1; orr x1, x1, #1; msr sctlr_el1, x1
    with pytest.raises(NotImplementedError, match="SCTLR_EL1.M"):
        machine.run(*words)
    machine.run(NOP)  # it did not happen
    machine.uc.cpr_write(3, 0, 1, 0, 0, machine.uc.cpr_read(3, 0, 1, 0, 0) | 1)
    with pytest.raises(NotImplementedError, match="stage 1 is on"):
        machine.run(NOP)


def test_other_exception_levels_are_refused(machine):
    machine.uc.reg_write(arm64.UC_ARM64_REG_PSTATE, 0x3C9)
    with pytest.raises(ValueError, match="EL2"):
        machine.cpu.run(CODE, CODE + 4)


def test_the_vcpu_is_taken_while_it_runs():
    machine = Machine(vcpus=2)
    thread, result = spinning(machine, machine.cpu, [COUNT, branch(-1)], x3=0)
    while not machine.cpu.counters.fills:
        threading.Event().wait(0.001)
    with pytest.raises(RuntimeError, match="in use"):
        machine.vm.vcpus[0].load(machine.tables.vttbr(2), machine.tables.vtcr)
    with pytest.raises(RuntimeError, match="runs already"):
        machine.cpu.run(CODE)
    with pytest.raises(RuntimeError, match="stop it first"):
        machine.cpu.detach()
    second = embed.attach(new_uc(), machine.vm, 0)
    with pytest.raises(RuntimeError, match="in use by another thread"):
        second.run(CODE)
    machine.cpu.stop()
    thread.join()
    assert result == [Exit.STOPPED]
    machine.vm.vcpus[1].put()
    with pytest.raises(RuntimeError, match="load"):
        machine.cpus[1].run(CODE)


def test_unicorn_alone_gets_no_fill(machine):
    """Only ``run`` holds the vCPU; what else asks, such as ``mem_protect``, is told no."""
    machine.program(NOP)
    with pytest.raises(UcError):
        machine.uc.emu_start(CODE, CODE + 4)
    machine.uc.mem_map(0x7000_0000_0000, PAGE)
    machine.uc.mem_protect(0x7000_0000_0000, PAGE, 1)
    machine.run(NOP)


# --- attaching ---


def test_arguments_are_checked(machine):
    with pytest.raises(ValueError, match="arm64"):
        embed.attach(Uc(UC_ARCH_X86, UC_MODE_64), machine.vm)
    with pytest.raises(TypeError, match=r"unicorn\.Uc"):
        embed.attach(None, machine.vm)
    with pytest.raises(ValueError, match="vcpu must be 0 to 0, got 1"):
        embed.attach(new_uc(), machine.vm, 1)
    uc = new_uc()
    uc.ctl_set_page_size(65536)
    uc.mem_map(0, 65536)
    with pytest.raises(ValueError, match="65536 bytes are larger than the host's"):
        embed.attach(uc, machine.vm)
    with pytest.raises(ValueError, match="multiples of 4096"):
        machine.cpu.map_ram(POOL + 1, bytearray(PAGE))
    with pytest.raises(ValueError, match="writable"):
        machine.cpu.map_ram(POOL, bytes(PAGE))
    with pytest.raises(UcError, match="UC_ERR_MAP"):
        machine.cpu.map_ram(POOL, bytearray(PAGE))


def test_one_unicorn_has_one_cpu(machine):
    """It has one TLB: two would each keep a part of it in step."""
    with pytest.raises(ValueError, match="attached already"):
        embed.attach(machine.uc, machine.vm)
    machine.cpu.detach()
    machine.cpu = embed.attach(machine.uc, machine.vm)


def test_detach_leaves_unicorn_as_it_was(machine):
    machine.run(NOP)
    buffer = bytearray(PAGE)
    machine.cpu.map_ram(POOL + M, buffer)
    machine.cpu.detach()
    buffer.append(0)  # nobody holds it
    assert not list(machine.uc.mem_regions())
    with pytest.raises(RuntimeError, match="detached"):
        machine.cpu.run(CODE)
    with pytest.raises(RuntimeError, match="detached"):
        machine.cpu.map_ram(POOL + M, bytearray(PAGE))  # nobody would hold it
    machine.cpu.detach()
    again = embed.attach(machine.uc, machine.vm)
    again.map_memory(OFFSET)
    again.map_memory(OFFSET)
    assert again.run(CODE, CODE + 4) == Exit.DONE


def test_memory_that_came_later(machine):
    machine.tables.map(HERE, 0x7000_0000)
    machine.mem.add(0x7000_0000, PAGE)
    machine.mem.write64(0x7000_0000, 3)
    machine.cpu.map_memory(OFFSET)
    assert machine.run(LOAD, x0=HERE) == 3


def test_nothing_is_kept_alive():
    machine = Machine(device=lambda *_: 1)
    machine.tables.map(HERE, DEVICE)
    machine.run(LOAD, x0=HERE)
    gone = [weakref.ref(machine.cpu), weakref.ref(machine.vm)]
    uc = machine.uc
    del machine
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert not list(uc.mem_regions())


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_an_interpreter_that_ends_while_attached():
    result = python(
        "import s2shadow as s2, unicorn\n"
        "from s2shadow.embed import unicorn as embed\n"
        "uc = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)\n"
        "mem = s2.GuestMemory(); mem.add(0, 1 << 20)\n"
        "cpu = embed.attach(uc, s2.NestedVM(mem)); cpu.map_memory()\n"
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_unicorn_is_only_imported_by_the_adapter():
    assert python("import s2shadow, sys; assert 'unicorn' not in sys.modules").returncode == 0
    result = python("import sys; sys.modules['unicorn'] = None; import s2shadow.embed.unicorn")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "ImportError: s2shadow.embed.unicorn needs Unicorn 2.1.4: pip install 's2shadow[unicorn]'"
    )


# --- everything at once ---


def test_random_events_against_a_plain_model(rng):
    """Loads and stores one by one, while L1 edits its table with TLBIs and the host moves pages. A model in dicts says
    what each must see: L1's table and the host's are looked up anew for every access."""
    machine = Machine()
    pages = 12
    guest, host = {}, {}  # IPA page -> (cIPA page, perm); cIPA page -> page of the pool
    contents = np.zeros(POOL_PAGES, dtype=np.uint64)
    machine.run(NOP)
    machine.vm.host.populate = None
    done = {"load": 0, "store": 0, "fault": 0}
    for step in range(3000):
        ipa, cipa = int(rng.integers(pages)), int(rng.integers(pages))
        match rng.choice(["load", "store", "l1", "host", "take", "protect"], p=[0.4, 0.3, 0.1, 0.08, 0.08, 0.04]):
            case "l1":
                perm = str(rng.choice(["r", "rw", "rwx"]))
                guest[ipa] = cipa, perm
                machine.tables.map(HERE + ipa * PAGE, DATA + cipa * PAGE, perm=perm)
                machine.vm.vcpus[0].tlbi("IPAS2E1IS", (HERE >> 12) + ipa)
            case "host":
                page = int(rng.integers(POOL_PAGES))
                host[cipa] = page, True
                machine.vm.host.map(DATA + cipa * PAGE, POOL + page * PAGE, PAGE)
            case "take":
                host.pop(cipa, None)
                machine.vm.unmap(DATA + cipa * PAGE, DATA + (cipa + 1) * PAGE)
            case "protect":
                if cipa in host:
                    host[cipa] = host[cipa][0], False
                    machine.vm.host.protect(DATA + cipa * PAGE, DATA + (cipa + 1) * PAGE, "r")
            case access:
                store = access == "store"
                backing, perm = guest.get(ipa, (None, ""))
                allowed = ("w" in perm if store else "r" in perm) and backing in host and (
                    not store or host[backing][1])
                end = machine.program(STORE if store else LOAD)
                machine.set(x0=HERE + ipa * PAGE, x1=step)
                if not allowed:
                    with pytest.raises(embed.UnhandledFault):
                        machine.cpu.run(CODE, end)
                    done["fault"] += 1
                    continue
                assert machine.cpu.run(CODE, end) == Exit.DONE
                done[access] += 1
                if store:
                    contents[host[backing][0]] = step
                assert machine.x(1) == contents[host[backing][0]]
                assert machine.pool[host[backing][0] * PAGE // 8] == contents[host[backing][0]]
    assert min(done.values()) > 100
    machine.vm.check()


@pytest.mark.parametrize("mib, rounds", [(8, 3), (64, 1)])
def test_the_example_of_the_balloon(capsys, mib, rounds):
    assert examples.load("unicorn_balloon").main(mib, rounds)
    assert "right" in capsys.readouterr().out
