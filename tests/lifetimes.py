"""Lifetimes of engines and memories of every kind, and what the process holds before and after many of them.

    python tests/lifetimes.py COUNT [KIND…]

makes COUNT of them, all kinds in turn, and then says what the process still holds; exit code 1 where anything grew. It
starts itself once more with an allocator that counts exactly. ``S2SHADOW_SEED`` repeats a run.
"""

import ctypes
import gc
import mmap
import os
import random
import sys
import tempfile
import threading
import time
import weakref
from collections import Counter
from contextlib import suppress

import numpy as np

import s2shadow as s2
from capitable import CALLBACK, CAS_DONE, CVM, POPULATE_LINEAR, READONLY, Failed, Populate, aligned, api, call, native
from rig import AF, DATA, DBM, HA, HD, HOST, PAGE, RAM, K, M, Rig, single, span
from s2shadow import EXEC, READ, WRITE, GuestMemory, HostMapping, Linear, NestedVM, TlbModel
from s2shadow.vmem import refuse
from sanitizer import SANITIZED  # whose allocator counts otherwise, and keeps what was freed for a while
from seed import SEED

PAGES = 24
KINDS = {}
WRONG = (ValueError, TypeError, IndexError)


def lifetime(function):
    KINDS[function.__name__] = function
    return function


def refused(act, *arguments, errors=WRONG, **options):
    try:
        act(*arguments, **options)
    except errors:
        return
    raise AssertionError(f"{act} took {arguments} {options}")


# --- engines of Python -------------------------------------------------------------------------------------------


def machine(rng, host=True, **options):
    """L1 maps some pages twice and a block; nothing is shadowed yet."""
    r = Rig(host=host, tlbi=rng.choice(("exact", "kvm72")), vtcr=HA | HD, **options)
    r.tables.map_range(0, DATA, PAGES * PAGE)
    r.tables.map_range(M, DATA, PAGES // 2 * PAGE, perm="rx")
    r.tables.map(2 * M, RAM + 2 * M, 2)
    return r


def work(r, rng):
    """A little of everything that makes or drops what an engine keeps."""
    ipas = [page * PAGE for page in range(PAGES)]
    r.vcpu.fault_many(ipas, READ)
    r.vcpu.fault_many([M + ipa for ipa in ipas], np.array([READ, EXEC] * (PAGES // 2), dtype=np.uint8))
    r.fault(2 * M + rng.randrange(M))
    r.vcpu.translate_many(ipas)
    r.vm.log_dirty(DATA, DATA + 2 * M)
    r.fault(rng.randrange(PAGES) * PAGE, WRITE)
    r.vm.dirty_log(DATA, DATA + 2 * M)
    r.vm.unmap(DATA, DATA + 2 * PAGE)
    r.vm.host.protect(DATA + 4 * PAGE, DATA + 8 * PAGE, "r")
    r.vm.host.map(DATA, HOST, PAGE)
    r.vcpu.tlbi("IPAS2E1IS", single(3 * PAGE, PAGE, 3))
    r.vcpu.tlbi("RIPAS2E1IS", span(0, PAGE, num=rng.randrange(4)))
    tlbis = np.zeros(3, dtype=s2.TLBI_OP_DTYPE)
    tlbis["insn"], tlbis["xt"] = 0xD50C_8020, [single(n * PAGE) for n in range(3)]
    r.vm.tlbi_many(tlbis)
    r.fault(0)
    r.vm.age(DATA, DATA + M)
    r.vm.test_young(DATA, DATA + M)
    r.vm.take_tlbis(rng.choice((None, 3)))


def of_policy(teardown):
    def live(rng):
        r = machine(rng, teardown=teardown, vcpus=rng.randrange(1, 4))
        work(r, rng)
        if not rng.randrange(8):
            r.vm.check()
    KINDS[f"vm_{teardown.replace('-', '_')}"] = live


for name in ("reverse-map", "interval-map", "blow-away", "blow-away-lean"):
    of_policy(name)


@lifetime
def vm_unused(rng):
    NestedVM(GuestMemory(), vcpus=rng.randrange(1, 9), teardown=rng.choice(("reverse-map", "interval-map")))


@lifetime
def vm_of_another_format(rng):
    """Granules of 16K and 64K, big-endian tables, wide addresses."""
    granule = rng.choice((16 * K, 64 * K))
    features = s2.Features(host_granule=granule, pa_bits=48)
    r = Rig(features, granule=granule, big_endian=rng.random() < 0.5)
    r.tables.map_range(0, DATA, 4 * granule)
    r.vcpu.fault_many(np.arange(4, dtype=np.uint64) * granule)
    r.vm.unmap(DATA, DATA + granule)


@lifetime
def vm_contexts(rng):
    """More keys than contexts: they are recycled; each holds leaves."""
    r = machine(rng, contexts=3, vcpus=2)
    for vmid in range(1, 9):
        r.load(vmid, n=vmid & 1)
        r.vm.vcpus[vmid & 1].fault_many([page * PAGE for page in range(PAGES)])
        if vmid == 5:
            r.vm.vcpus[1].put()
    for context in r.vm.contexts:
        r.vm.shadow(context.index), r.vm.tables(context.index)
    r.vm.reverse(DATA), r.vm.host.leaves(), r.vm.tables(), r.vm.stats
    if not rng.randrange(4):
        r.vm.check()


@lifetime
def vm_at_a_bound(rng):
    """Tables for less than L1 uses: leaf tables are evicted, or the answer is NO_MEMORY."""
    teardown = rng.choice(("reverse-map", "interval-map", "blow-away"))
    r = Rig(teardown=teardown, max_table_bytes=640 * K if teardown == "interval-map" else 384 * K)
    for part in range(40):
        r.tables.map(part * 2 * M, DATA + part * PAGE)
    r.vcpu.fault_many([part * 2 * M for part in range(40)] * 2)
    for vmid in (2, 3):
        r.load(vmid)
        r.vcpu.fault_many([part * 2 * M for part in range(20)])


@lifetime
def vm_dirty_logging(rng):
    """The log is on, off, or on for a part, when the engine goes."""
    r = machine(rng, teardown=rng.choice(("reverse-map", "blow-away")))
    r.vm.log_dirty(RAM, RAM + 16 * M)
    r.vcpu.fault_many([page * PAGE for page in range(PAGES)], WRITE)
    r.vm.dirty_log(RAM, RAM + 16 * M)
    if rng.random() < 0.5:
        r.vm.log_dirty(RAM, RAM + rng.choice((M, 16 * M)), False)


@lifetime
def vm_captured_host(rng):
    """A host's table that is loaded from another engine's."""
    first, second = machine(rng), machine(rng, host=False)
    addresses, pages = first.vm.tables()
    context = first.vm.contexts[0]
    second.vm.host.load(addresses, pages, context.host_vttbr, context.host_vtcr)
    second.vm.host.map(RAM, HOST, M)


@lifetime
def tlb_model(rng):
    r = machine(rng)
    model = TlbModel(64, 4)
    for page in range(PAGES):
        r.fault(page * PAGE)
        model.translate(r.vcpu, page * PAGE)
    r.vm.unmap(DATA, DATA + M)
    model.apply(r.vm.take_tlbis())


# --- whom the engine asks ----------------------------------------------------------------------------------------


@lifetime
def populate_linear(rng):
    r = machine(rng, host=False)
    r.vm.host.populate = Linear(HOST, fresh=rng.random() < 0.5)
    work(r, rng)
    r.vm.host.populate = rng.choice((None, "linear", Linear(0, 2 * M)))


@lifetime
def populate_callable(rng):
    r = machine(rng, host=False)
    r.vm.host.populate = lambda cipa, access: None if cipa & PAGE else HostMapping(HOST + (cipa & -PAGE), PAGE, "rw")
    work(r, rng)


@lifetime
def populate_that_fails(rng):
    """It raises in a batch, answers nonsense, or is interrupted; the traceback goes with the engine."""
    r = machine(rng, host=False)
    left = [rng.randrange(PAGES)]

    def populate(cipa, _):
        left[0] -= 1
        if left[0] < 0:
            raise rng.choice((KeyError, KeyboardInterrupt, MemoryError))(cipa)
        return HostMapping(HOST + (cipa & -PAGE), PAGE)

    r.vm.host.populate = populate
    ipas = np.arange(PAGES, dtype=np.uint64) * PAGE
    errors = (KeyError, KeyboardInterrupt, MemoryError)
    refused(r.vcpu.fault_many, ipas, out=np.zeros(PAGES, dtype=s2.FAULT_DTYPE), errors=errors)
    refused(r.fault, 23 * PAGE, errors=errors)
    for nonsense in (5, "linear", HostMapping(1 << 50, PAGE)):
        r.vm.host.populate = lambda cipa, access, answer=nonsense: answer
        refused(r.fault, 23 * PAGE)


@lifetime
def populate_in_a_cycle(rng):
    """The callable holds the engine that holds it: only the collector ends them."""
    r = machine(rng, host=False)

    def populate(cipa, _):
        if cipa == DATA + 5 * PAGE:
            r.vm.unmap(DATA, DATA + 2 * PAGE)       # from inside a fault
        return HostMapping(HOST + (cipa & -PAGE), PAGE)

    r.vm.host.populate = populate
    r.vcpu.fault_many([page * PAGE for page in range(PAGES)])


class Embedder:
    """Has the engine, its parts, its memory and itself."""

    def __init__(self, rng):
        self.rig = machine(rng, host=False)
        self.parts = [self.rig.vm, self.rig.vm.host, *self.rig.vm.vcpus, self.rig.mem, self]
        self.rig.vm.host.populate = self.answer
        self.gone = weakref.ref(self.rig.vm, lambda _, parts=self.parts: None)

    def answer(self, cipa, _):
        return HostMapping(HOST + (cipa & -PAGE), PAGE)


@lifetime
def cycles(rng):
    embedder = Embedder(rng)
    work(embedder.rig, rng)
    other = Embedder(rng)
    other.parts.append(embedder)
    embedder.parts.append(other)


@lifetime
def exception_in_a_cycle(rng):
    """An exception keeps the frame, and with it the engine, that keeps the exception."""
    r = machine(rng)
    try:
        r.vcpu.fault_many([0], out=np.zeros(2, dtype=np.uint8))
    except (TypeError, ValueError) as error:
        kept = error
        r.kept = kept


@lifetime
def parts_outlive(rng):
    """vCPUs, the host, arrays and memory are used after their VM has gone; they go in any order."""
    r = machine(rng, vcpus=2)
    parts = [*r.vm.vcpus, r.vm.host, r.mem, r.vm.shadow(0), r.fault(0), r.vm.unmap(DATA, DATA + PAGE), r.vm._c_handle]
    del r.vm, r.vcpu
    parts[0].fault(PAGE)
    parts[2].map(DATA, HOST, PAGE)
    rng.shuffle(parts)
    while parts:
        parts.pop()


# --- what fails --------------------------------------------------------------------------------------------------


@lifetime
def not_made(rng):
    """Arguments that are wrong, at every place where they are looked at."""
    mem = GuestMemory()
    for options in ({"vcpus": 0}, {"vcpus": 4, "contexts": 2}, {"teardown": "none"}, {"tlbi": 3}, {"attributes": ""},
                    {"max_table_bytes": 5}, {"table_base": 1}, {"table_base": 1 << 60}, {"features": 5}):
        refused(NestedVM, mem, **options)
    refused(NestedVM, None)


@lifetime
def memory_refused(rng):
    """Some allocation is refused while an engine is made or works, once or from there on."""
    teardown = rng.choice(("reverse-map", "interval-map"))
    refuse(rng.randrange(1, 60), rng.choice((1, 1 << 40)))
    try:
        with suppress(MemoryError):
            r = machine(rng, host=rng.random() < 0.5, teardown=teardown)
            r.vm.host.populate = "linear"
            work(r, rng)
    finally:
        refuse(0)


@lifetime
def wrong_use(rng):
    """Everything that an engine says no to."""
    r = machine(rng)
    for act in (
        lambda: r.vm.unmap(1, 2), lambda: r.vm.unmap(0, 1 << 60), lambda: r.vm.unmap(0, PAGE, "maybe"),
        lambda: r.vm.host.map(RAM, HOST + 1, PAGE), lambda: r.vm.host.map(RAM, HOST, PAGE, perm="q"),
        lambda: r.vm.host.protect(RAM, RAM + PAGE, 1 << 20), lambda: r.vm.dirty_log(5, 6),
        lambda: r.vcpu.fault_many(["x"]), lambda: r.vcpu.fault_many([0], out=np.zeros(2, dtype=s2.FAULT_DTYPE)),
        lambda: r.vcpu.fault_many([0, 1], np.zeros(3, dtype=np.uint8)), lambda: r.vcpu.tlbi("NOTHING"),
        lambda: r.vcpu.load(1 << 70, 0), lambda: r.vm.tlbi_many(np.zeros(2)), lambda: r.vm.shadow(99),
        lambda: r.mem.remove(RAM), lambda: setattr(r.vm.host, "populate", 7), lambda: NestedVM(r.mem, nothing=1),
        lambda: r.vm.host.load(np.zeros(1, dtype=np.uint64), np.zeros((1, PAGE), dtype=np.uint8), 1, 1),
    ):
        refused(act)


@lifetime
def threads(rng):
    """vCPUs on threads of their own beside host changes; the last reference is dropped on one of them."""
    r = machine(rng, vcpus=2)
    ipas = np.arange(PAGES, dtype=np.uint64) * PAGE

    def run(vm, n):
        r.load(n + 1, n=n)
        for _ in range(3):
            vm.vcpus[n].fault_many(ipas)

    runners = [threading.Thread(target=run, args=(r.vm, n)) for n in range(2)]
    for runner in runners:
        runner.start()
    r.vm.unmap(DATA, DATA + 8 * PAGE)
    for runner in runners:
        runner.join()


# --- memories ----------------------------------------------------------------------------------------------------


@lifetime
def memory_regions(rng):
    """Regions of every kind come, are written, go; the rest go with the memory."""
    mem = GuestMemory()
    kept = bytearray(PAGE)
    mem.add(0, 16 * M)
    mem.add(1 << 30, buffer=kept)
    mem.add(2 << 30, buffer=bytes(PAGE), readonly=True)
    mem.add(3 << 30, buffer=np.zeros(512, dtype=np.uint64))
    mem.add(4 << 30, PAGE, device=True)
    mem.write(100, b"x" * 9000)
    mem.read(0, 2 * PAGE), mem.regions
    config = s2.Stage2Config(0, 25 | 1 << 6 | 5 << 16)
    s2.walk(mem, config, 0)
    s2.walk_many(mem, config, np.arange(8, dtype=np.uint64) * PAGE)
    for base in rng.sample(range(5), rng.randrange(6)):
        mem.remove(base << 30)


@lifetime
def memory_mmaps(rng):
    """Anonymous memory and a file's, which stay mapped as long as a region needs them and no longer."""
    mem = GuestMemory()
    with tempfile.TemporaryFile() as file:
        file.truncate(64 * K)
        of_file = mmap.mmap(file.fileno(), 64 * K)
    anonymous = mmap.mmap(-1, 64 * K)
    mem.add(0, buffer=of_file)
    mem.add(M, buffer=memoryview(anonymous)[:PAGE])
    mem.write64(8, 5)
    with suppress(BufferError):
        anonymous.close()
    vm = NestedVM(mem)
    vm.host.populate = "linear"
    vm.vcpus[0].load(0, 0, hcr=0)
    vm.vcpus[0].fault(0)
    if rng.random() < 0.5:
        del vm
        mem.remove(0)
        of_file.close()


@lifetime
def memory_refusals(rng):
    mem = GuestMemory()
    mem.add(0, M)
    for options in ({"size": M}, {"size": 5}, {"buffer": bytes(PAGE)}, {"buffer": 5}, {}, {"buffer": bytearray(5)},
                    {"buffer": bytearray(PAGE), "size": 5}, {"buffer": bytearray(PAGE), "device": True}):
        refused(mem.add, PAGE, **options)
    refused(mem.read, M, 1)
    refused(mem.write, M - 1, b"xx")
    refused(mem.remove, PAGE)
    refuse(rng.randrange(1, 5))
    with suppress(MemoryError):
        mem.add(2 * M, M)
        mem.remove(0)
    refuse(0)


# --- the C API ---------------------------------------------------------------------------------------------------

C_ROOT, C_LEVEL_2, C_LEVEL_3, C_DATA, C_SIZE = 0x1000, 0x2000, 0x3000, 0x40000, 0x80000
C_VTCR = 25 | 1 << 6 | 5 << 16 | 1 << 19 | HA | HD
C_VTTBR = C_ROOT | 5 << 48


def c_words():
    words = aligned(C_SIZE)
    words[C_ROOT // 8] = C_LEVEL_2 | 3
    words[C_LEVEL_2 // 8] = C_LEVEL_3 | 3
    for page in range(PAGES):
        words[C_LEVEL_3 // 8 + page] = C_DATA + page * PAGE | 0x7FF ^ AF | DBM
    return words


def c_work(vm, rng):
    vm.load(C_VTTBR, C_VTCR)
    vm.fault_many(np.arange(PAGES, dtype=np.uint64) * PAGE, rng.choice((READ, WRITE)))
    vm.fault(0, WRITE)
    vm.translate(PAGE)
    vm.walk(PAGE)
    vm.change(api.host_unmap, C_DATA, C_DATA + 4 * PAGE, 0)
    vm.change(api.host_map, C_DATA, 1 << 32, PAGE, READ, 16)
    vm.change(api.log_dirty, C_DATA, C_DATA + 16 * PAGE, 1)
    vm.bitmap(api.dirty_log, C_DATA, C_DATA + 16 * PAGE)
    vm.bitmap(api.age, C_DATA, C_DATA + 16 * PAGE)
    vm.tlbi(0xD50C803F, 3)
    vm.take_tlbis(rng.randrange(20))
    vm.stats()


@lifetime
def c_ram(rng):
    with CVM(vcpus=rng.randrange(1, 3), teardown=rng.randrange(4), tlbi=rng.randrange(2)) as vm:
        vm.add_ram(0, c_words())
        vm.add_ram(C_SIZE, aligned(PAGE), READONLY)
        call(api.add_device(vm.handle, 2 * C_SIZE, PAGE))
        vm.populate_linear(1 << 32)
        c_work(vm, rng)
        if rng.random() < 0.5:
            vm.remove(0)


@lifetime
def c_callbacks(rng):
    """Tables that only callbacks reach, pages that only one knows; they stop answering at some point."""
    words, left = c_words(), [rng.randrange(30, 200)]

    def read(cipa):
        return int(words[cipa // 8])

    def swap(cipa, _, desired):
        words[cipa // 8] = desired
        return CAS_DONE, desired

    def populate(cipa, _, mapping):
        left[0] -= 1
        mapping.pa = (1 << 32) + (cipa & -PAGE)
        return -1 if left[0] < 0 else 1

    with CVM(teardown=rng.randrange(4)) as vm:
        vm.add_callbacks(0, C_SIZE, read, swap)
        vm.populate(populate)
        try:
            c_work(vm, rng)
            c_work(vm, rng)
        except Failed as failed:
            assert failed.status == CALLBACK, failed
        if rng.random() < 0.5:
            vm.remove(0)


@lifetime
def c_not_made(rng):
    """Options that are wrong, no memory at any place, arguments that are wrong."""
    refused(CVM, vcpus=0, errors=Failed)
    refuse(rng.randrange(1, 30), rng.choice((1, 1 << 40)))
    with suppress(Failed):
        with CVM(vcpus=2, teardown=rng.randrange(4)) as vm:
            vm.add_ram(0, c_words())
            vm.populate_linear(1 << 32)
            c_work(vm, rng)
            refused(vm.remove, 5, errors=Failed)
            refused(vm.add_ram, 0, c_words(), errors=Failed)
            refused(vm.fault, 0, vcpu=9, errors=Failed)
    refuse(0)


@lifetime
def c_on_a_nested_vm(rng):
    """The C functions on an engine of Python's."""
    r = machine(rng)
    handle, fault = native(r.vm), np.zeros(1, dtype=s2.FAULT_DTYPE)
    for page in range(PAGES):
        api.fault(handle, 0, page * PAGE, READ, ctypes.cast(fault.ctypes.data, ctypes.POINTER(CFault)))
    api.set_populate(handle, ctypes.byref(Populate(policy=POPULATE_LINEAR)))
    api.host_unmap(handle, DATA, DATA + M, 0, None)
    api.destroy(handle)
    r.fault(0)


CFault = dict(api._fields_)["fault"]._argtypes_[4]._type_


# --- what is held ------------------------------------------------------------------------------------------------

libc = ctypes.CDLL(None)


class MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]


def heap():
    """Bytes of malloc that are in use."""
    if SANITIZED or not hasattr(libc, "mallinfo2"):
        return 0
    libc.mallinfo2.restype = MallInfo
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd


def held():
    """What the process holds now that no lifetime is under way, by name."""
    for _ in range(3):
        gc.collect()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    with open("/proc/self/statm") as file:
        pages = [int(word) for word in file.read().split()]
    with open("/proc/self/maps") as file:
        maps = sum(1 for _ in file)
    counts = {
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "python blocks": sys.getallocatedblocks(),
        "heap": heap(),
    }
    if not SANITIZED:
        counts |= {"maps": maps, "address space": pages[0] * PAGE, "resident": pages[1] * PAGE}
    counts |= {f"objects of {kind}": n for kind, n in
               Counter(f"{type(o).__module__}.{type(o).__qualname__}" for o in gc.get_objects()).items()}
    return counts


# What caches of Python and of the C library may do between two looks. A leak shows in each lifetime.
LIMITS = {"python blocks": 8, "heap": 64, "resident": 64 * K}
# Of the whole process: the table of Python's interned strings alone may double once, by 530 KiB.
DRIFT = {"python blocks": 2000, "heap": M, "resident": 4 * M, "address space": 16 * M, "maps": 16}
ROUNDS = range(2, 16)


def leaks(run, each):
    """[(what, how much)] that each round of ``run``, which is ``each`` lifetimes, leaves behind: what grew in every one
    of many, by the least that it grew. A cache fills and stops; once nothing is left that grew, all is well."""
    run()
    before, grew = held(), None
    before = held()                 # from here on each one counts itself and one more
    for n in range(1, ROUNDS.stop):
        run()
        after = held()
        more = {name: n - before.get(name, 0) for name, n in after.items()
                if n - before.get(name, 0) > LIMITS.get(name, 0) + each // 50}
        grew = more if grew is None else {name: min(n, more[name]) for name, n in grew.items() if name in more}
        before = after
        if not grew and n >= ROUNDS.start:
            break
    return list(grew.items())


def process():
    return {name: n for name, n in held().items() if not name.startswith("objects")}


def drift(before, after):
    """[(what, how much)] that the whole process has more of."""
    return [(name, after[name] - n) for name, n in before.items() if after[name] - n > DRIFT.get(name, 0)]


# --- leaks on purpose: what the looks must see -------------------------------------------------------------------

kept = []
LEAKS = {
    "python object": lambda rng: kept.append([]),
    "python block": lambda rng: kept.append(bytes(100)),
    "array": lambda rng: kept.append(np.zeros(1000)),
    "engine": lambda rng: kept.append(NestedVM(GuestMemory())),
    "malloc": lambda rng: libc.malloc(24),
    "mmap": lambda rng: kept.append(mmap.mmap(-1, PAGE)),
    "file": lambda rng: os.dup(0),
    "thread": lambda rng: threading.Thread(target=threading.Event().wait, daemon=True).start(),
    "C engine": lambda rng: CVM(),
}


def main(count, names):
    """Some of each kind to warm up; then each by itself, until it is known what it leaves; all until ``count``."""
    kinds = {name: (KINDS | LEAKS)[name] for name in names or KINDS}
    each = min(200, max(12, count // len(kinds) // 3))
    rng = random.Random(SEED)
    print(f"{len(kinds)} kinds, {each} of each at a time, S2SHADOW_SEED={SEED}")
    failed, lived, first, began = False, 0, None, time.perf_counter()

    def run(live, n):
        nonlocal lived
        for _ in range(n):
            live(rng)
        lived += n

    for live in kinds.values():
        run(live, 3)
    while first is None or (lived < count and not failed):
        first = first or process()
        for kind, live in kinds.items():
            for name, more in leaks(lambda live=live: run(live, each), each):
                failed = True
                print(f"LEAK: {kind}: {more:,} {name} or more in every {each} lifetimes", flush=True)
        now = process()
        print(f"{lived:7} lifetimes, {time.perf_counter() - began:6.1f} s: " +
              ", ".join(f"{number:,} {name}" for name, number in now.items()), flush=True)
    for name, more in drift(first, now):
        failed = True
        print(f"LEAK: {more:,} more {name} at the end than at the start")
    return failed


# the first keeps what was freed, and it would count as used; the second gives each thread address space of its own
EXACT = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.arena_max=1"}

if __name__ == "__main__":
    if os.environ.get("GLIBC_TUNABLES") != EXACT["GLIBC_TUNABLES"]:
        os.execve(sys.executable, sys.orig_argv, os.environ | EXACT)
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
