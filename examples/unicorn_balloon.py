"""L2 adds up 64 MiB on Unicorn while the host takes its pages away: python examples/unicorn_balloon.py

Who is who: the arm64 program below is L2. L1 is ``Guest``: its stage-2 table in its own memory, and a handler that maps
what L2 touches. L0 is ``Host``: it owns the machine's memory, maps L1's pages to it, and in a thread of its own takes
some away again and again: unmap, wait until no CPU can reach them, save what they hold, overwrite them. A page comes
back when L2 touches it, somewhere else. Had L2 read through a stale TLB entry, the sums would be wrong; had it written
through one, the host would find its free pages changed.

Prints what happened; exit status 1 if the sums are not what they must be.
"""

import argparse
import random
import sys
import threading
import time

import numpy as np
from unicorn import UC_ARCH_ARM64, UC_MODE_ARM, Uc
from unicorn import arm64_const as arm64

import s2shadow as s2
from s2shadow.embed.unicorn import Abort, attach

PAGE, BLOCK, MIB = 4096, 2 << 20, 1 << 20

# x0 source, x1 sums, x2 end of the source, x3 rounds
PROGRAM = [
    0xAA0003E4,  # round: mov  x4, x0
    0xAA0103E5,  #        mov  x5, x1
    0xA8C11C86,  # next:  ldp  x6, x7, [x4], #16
    0xA94024A8,  #        ldp  x8, x9, [x5]
    0x8B060108,  #        add  x8, x8, x6
    0x8B070129,  #        add  x9, x9, x7
    0xA88124A8,  #        stp  x8, x9, [x5], #16
    0xEB02009F,  #        cmp  x4, x2
    0x54FFFF41,  #        b.ne next
    0xF1000463,  #        subs x3, x3, #1
    0x54FFFEC1,  #        b.ne round
]

# What L2 sees: code, source and sums, in the first GiB. L1 keeps them in its own memory, in another order.
CODE, SOURCE, SUMS = 0, 128 * MIB, 512 * MIB
L1_RAM, L1_DATA = 0x4000_0000, 0x1_0000_0000
# The machine: where L1's own RAM is, and the pool that its data pages come from.
PA_L1, PA_POOL = 0x10_0000_0000, 0x20_0000_0000

VTTBR = 1 << 48 | L1_RAM + PAGE
VTCR = 64 - 30 | 0 << 6 | 1 << 8 | 1 << 10 | 3 << 12 | 5 << 16 | 1 << 31  # 4K pages, 30 bits: one table, of level 2
BLOCK_RW = 1 << 10 | 3 << 8 | 3 << 6 | 0xF << 2 | 1  # AF, inner shareable, read-write, Normal write-back


class Guest:
    """L1: code at the bottom of its RAM, then its stage-2 table."""

    def __init__(self, ram: np.ndarray, size: int) -> None:
        self.table = ram[PAGE : 2 * PAGE].view(np.uint64)
        ram[: 4 * len(PROGRAM)] = np.array(PROGRAM, dtype=np.uint32).view(np.uint8)
        self.table[CODE // BLOCK] = L1_RAM | BLOCK_RW
        self.sources, self.sums = L1_DATA, L1_DATA + size
        self.faults = 0

    def on_fault(self, abort: Abort) -> bool:
        """L2 touched what L1 has not mapped: map the block around it."""
        block = abort.ipa & -BLOCK
        base, at = (self.sums, SUMS) if block >= SUMS else (self.sources, SOURCE)
        self.table[block // BLOCK] = base + block - at | BLOCK_RW
        self.faults += 1
        return True


class Host:
    """L0: a pool of pages, and which of L1's data pages each of them holds."""

    def __init__(self, vm: s2.NestedVM, pages: int, spare: int) -> None:
        self.vm = vm
        self.pool = np.zeros((pages + spare, PAGE), dtype=np.uint8)
        self.poison = np.full(PAGE, 0xDB, dtype=np.uint8)
        self.pool[pages:] = self.poison
        self.place = {L1_DATA + PAGE * page: page for page in range(pages)}  # of what is in the pool
        self.free = list(range(pages, pages + spare))
        self.saved: dict[int, np.ndarray] = {}
        self.lock = threading.Lock()
        self.taken = self.given_back = self.spoilt = 0
        vm.host.map(L1_DATA, PA_POOL, pages * PAGE)
        vm.host.populate = self.populate

    def populate(self, cipa: int, _access: s2.Access) -> s2.HostMapping | None:
        """L2 touched a page that is not there: any free one will do."""
        cipa &= -PAGE
        with self.lock:
            if cipa in self.saved:
                page = self.free.pop(random.randrange(len(self.free)))
                self.spoilt += not np.array_equal(self.pool[page], self.poison)
                self.pool[page] = self.saved.pop(cipa)
                self.place[cipa] = page
                self.given_back += 1
            return s2.HostMapping(PA_POOL + PAGE * self.place[cipa], PAGE)

    def take(self, cpu, start: int, pages: int) -> None:
        """Take pages away from L1: an MMU notifier, and what comes after it."""
        with self.lock:
            cpu.unmap(start, start + pages * PAGE)
            for cipa in range(start, start + pages * PAGE, PAGE):
                if cipa in self.place:
                    page = self.place.pop(cipa)
                    self.saved[cipa] = self.pool[page].copy()
                    self.pool[page] = self.poison
                    self.free.append(page)
                    self.taken += 1

    def contents(self, start: int, size: int) -> np.ndarray:
        """What L1's data pages hold, wherever they are now: uint64 array."""
        pages = (self.saved[at] if at in self.saved else self.pool[self.place[at]]
                 for at in range(start, start + size, PAGE))
        return np.concatenate(list(pages)).view(np.uint64)


def balloon(host: Host, cpu, pages: int, run: int, done: threading.Event) -> None:
    """Take ``run`` pages somewhere, give L2 a moment, again."""
    while not done.wait(0.0005):
        host.take(cpu, L1_DATA + PAGE * random.randrange(pages - run + 1), run)


def main(mib: int = 64, rounds: int = 4, run: int = 8) -> bool:
    size, pages = mib * MIB, 2 * mib * MIB // PAGE
    ram = np.zeros(BLOCK, dtype=np.uint8)
    mem = s2.GuestMemory()
    mem.add(L1_RAM, buffer=ram)
    mem.add(L1_DATA, pages * PAGE)  # never written: L2 reaches the pages through their physical addresses
    vm = s2.NestedVM(mem)
    vm.host.map(L1_RAM, PA_L1, BLOCK)
    guest, host = Guest(ram, size), Host(vm, pages, run)

    uc = Uc(UC_ARCH_ARM64, UC_MODE_ARM, cpu=arm64.UC_CPU_ARM64_A72)
    cpu = attach(uc, vm, on_l1_fault=guest.on_fault)
    cpu.map_ram(PA_L1, ram)
    cpu.map_ram(PA_POOL, host.pool.reshape(-1))
    vm.vcpus[0].load(VTTBR, VTCR)

    source = np.random.default_rng(1).integers(0, 1 << 64, size // 8, dtype=np.uint64)
    host.pool[: pages // 2] = source.view(np.uint8).reshape(-1, PAGE)
    for register, value in ((arm64.UC_ARM64_REG_X0, SOURCE), (arm64.UC_ARM64_REG_X1, SUMS),
                            (arm64.UC_ARM64_REG_X2, SOURCE + size), (arm64.UC_ARM64_REG_X3, rounds)):
        uc.reg_write(register, value)

    done = threading.Event()
    thread = threading.Thread(target=balloon, args=(host, cpu, pages, run, done))
    began = time.perf_counter()
    thread.start()
    try:
        cpu.run(CODE, CODE + 4 * len(PROGRAM))
    finally:
        done.set()
        thread.join()
    took = time.perf_counter() - began
    vm.check()

    right = np.array_equal(host.contents(guest.sums, size), source * np.uint64(rounds)) and not host.spoilt
    counters = cpu.counters
    print(f"{rounds} rounds over {mib} MiB in {took:.1f} s: {'right' if right else 'WRONG'}\n"
          f"host   {host.taken:,} pages taken, {host.given_back:,} given back elsewhere, "
          f"{host.spoilt} written to while they were free\n"
          f"L1     {guest.faults:,} faults handled\n"
          f"L2     {counters.fills:,} TLB fills, {counters.interruptions:,} times interrupted to flush")
    return right


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=int, default=64, help="size of the source (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="times that it is added (default: %(default)s)")
    arguments = parser.parse_args()
    sys.exit(0 if main(arguments.mib, arguments.rounds) else 1)
