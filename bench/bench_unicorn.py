"""A TLB fill in Unicorn: by the native hook of ``s2shadow.embed.unicorn``, by the least native hook, by one in Python.

A program loads and stores once in each of PAGES pages after a flush of the TLB: one fill a page. The floor is the same
program on the same memory, with a native hook that adds an offset and no more, in turns with it; what is above it
is the engine's.
"""

import ctypes
from time import perf_counter_ns

import numpy as np
import pytest

pytest.importorskip("unicorn", reason="no Unicorn here (extra 'unicorn')")
import unicorn
from unicorn import arm64_const as arm64
from unicorn import unicorn_const

import s2shadow as s2
from beds import ENTRIES, PAGE, stage2_tables
from s2shadow._floor import unicorn_fill
from s2shadow.embed.unicorn import attach

PAGES = 1 << 13
ROUNDS = 30
OFFSET = 1 << 36  # of a physical address from its cIPA
TABLES, DATA = 0x4000_0000, 0x8000_0000
VTCR = 64 - 39 | 1 << 6 | 5 << 16 | 1 << 31  # starts at level 1

# x0 address, x2 accesses, x4 stride
PROGRAM = [
    0xF9400001,  # ldr  x1, [x0]
    0xF9000001,  # str  x1, [x0]
    0x8B040000,  # add  x0, x0, x4
    0xF1000442,  # subs x2, x2, #1
    0x54FFFF81,  # b.ne to the start
]
CODE = PAGES * PAGE  # the page behind the data
END = CODE + 4 * len(PROGRAM)


class Runner:
    """The program on one Unicorn. ``run(begin, end)`` is how it is started."""

    def __init__(self, uc, run):
        self.uc, self.run = uc, run

    def prepare(self):
        for register, value in ((arm64.UC_ARM64_REG_X0, 0), (arm64.UC_ARM64_REG_X2, PAGES),
                                (arm64.UC_ARM64_REG_X4, PAGE)):  # fmt: skip
            self.uc.reg_write(register, value)
        self.uc.ctl(unicorn_const.UC_CTL_TLB_FLUSH, unicorn_const.UC_CTL_IO_WRITE)

    def ns(self):
        """Of one access, fill included."""
        self.prepare()
        began = perf_counter_ns()
        self.run(CODE, END)
        return (perf_counter_ns() - began) / PAGES


class Beds:
    def __init__(self):
        self.ram = np.zeros((PAGES + 1) * PAGE, dtype=np.uint8)
        self.ram[CODE : CODE + 4 * len(PROGRAM)] = np.array(PROGRAM, dtype=np.uint32).view(np.uint8)
        frames = DATA + PAGE * np.arange(PAGES + 1)
        image, _sizes = stage2_tables(TABLES, frames, levels=3)
        mem = s2.GuestMemory()
        mem.add(TABLES, buffer=image)
        mem.add(DATA, buffer=self.ram)
        self.vm = s2.NestedVM(mem)
        self.vm.host.map(DATA, DATA + OFFSET, len(self.ram))
        self.vcpu = self.vm.vcpus[0]
        self.vcpu.load(TABLES | 1 << 48, VTCR)
        self.cpu = attach(self.new_uc(), self.vm)
        self.cpu.map_memory(OFFSET)
        self.engine = Runner(self.cpu.uc, self.cpu.run)
        self.native = self.bare(self.hook_native)
        self.python = self.bare(self.hook_python)
        for runner in (self.engine, self.native, self.python):
            runner.ns()  # translates the program
        assert self.vm.stats.live == PAGES + 1 >= ENTRIES

    @staticmethod
    def new_uc():
        uc = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM, cpu=arm64.UC_CPU_ARM64_A72)
        uc.ctl_set_page_size(PAGE)
        uc.ctl_set_tlb_mode(unicorn_const.UC_TLB_VIRTUAL)
        return uc

    def bare(self, hook):
        uc = self.new_uc()
        uc.mem_map_ptr(DATA + OFFSET, len(self.ram), unicorn_const.UC_PROT_ALL, self.ram.ctypes.data)
        hook(uc)
        return Runner(uc, uc.emu_start)

    @staticmethod
    def hook_native(uc):
        from unicorn.unicorn_py3.unicorn import uclib

        uclib.uc_hook_add(uc._uch, ctypes.byref(ctypes.c_size_t()), unicorn_const.UC_HOOK_TLB_FILL,
                          ctypes.c_void_p(unicorn_fill()), ctypes.c_void_p(DATA + OFFSET), ctypes.c_uint64(1),
                          ctypes.c_uint64(0))  # fmt: skip

    @staticmethod
    def hook_python(uc):
        places = {page * PAGE: DATA + OFFSET + page * PAGE for page in range(PAGES + 1)}

        def fill(_uc, vaddr, _access, entry, _data):
            entry.paddr = places[vaddr]
            entry.perms = 7
            return True

        uc.hook_add(unicorn_const.UC_HOOK_TLB_FILL, fill)


@pytest.fixture(scope="module")
def beds():
    return Beds()


def fills(report, beds, runner, rounds=ROUNDS, before=lambda: None):
    def prepare():
        before()
        runner.prepare()

    report.rounds(lambda: runner.run(CODE, END), prepare, rounds=rounds, operations=PAGES,
                  floor=beds.native.ns)  # fmt: skip


@pytest.mark.benchmark(group="Unicorn: an access to a page that is not in its TLB")
def bench_unicorn_fill_hit(report, beds):
    """The shadow has the leaf."""
    before = beds.cpu.counters.fills
    fills(report, beds, beds.engine)
    assert beds.cpu.counters.fills >= before + PAGES


@pytest.mark.benchmark(group="Unicorn: an access to a page that is not in its TLB")
def bench_unicorn_fill_mapped(report, beds):
    """The shadow is empty: each fill walks L1's table and installs a leaf."""

    def empty():
        beds.vcpu.tlbi("VMALLS12E1")
        beds.cpu.sync()

    before = beds.vm.stats.installed
    fills(report, beds, beds.engine, before=empty)
    assert beds.vm.stats.installed >= before + PAGES


@pytest.mark.benchmark(group="Unicorn: an access to a page that is not in its TLB")
def bench_unicorn_fill_python(report, beds):
    """A hook in Python with a dict."""
    fills(report, beds, beds.python, rounds=10)
