"""Every allocation refused in turn: MemoryError, NO_MEMORY or a documented eviction, and the engine goes on.

``vmem.refuse(n)`` refuses the nth allocation from now on: address space, table pages, links, nodes and markers of the
reverse map, nodes of interval maps, lists of regions. Each scenario runs anew for n = 1, 2, 3 … until it no longer
asks for so many; once with that one refused, once with all from there on. Python's own objects have their turn too.
"""

import sys

import numpy as np
import pytest

import s2shadow
from hostile import canonical_vtcr
from rig import DATA, DEVICE, HOST, PAGE, RAM, RAM_SIZE, G, K, M, Rig
from s2shadow import HIT, L1_FAULT, MAPPED, NO_MEMORY, READ, WRITE, HostMapping, NestedVM
from s2shadow.vmem import refuse

ALL = 1 << 40
TEARDOWNS = ("reverse-map", "interval-map", "blow-away", "blow-away-lean")
FAR = RAM + 32 * M


@pytest.fixture(autouse=True)
def allowed():
    """Whatever a test does, nothing is refused after it."""
    yield
    refuse(0)


def in_turn(prepare, operate, after, count=1):
    """``operate`` with each allocation refused in turn; ``after`` judges what is left. How many there are."""
    n = 0
    while True:
        n += 1
        prepared = prepare()
        refuse(n, count)
        try:
            operate(prepared)
            failed = False
        except MemoryError:
            failed = True
        asked = refuse(0)
        after(prepared, failed)
        if asked < n:
            assert not failed
            return n - 1
        assert n < 400


# Things that are made


@pytest.mark.parametrize("teardown", TEARDOWNS)
def test_create(teardown):
    """Not made, or made and as good as any (the arena may be smaller)."""
    mem = s2shadow.GuestMemory()
    mem.add(RAM, M)
    made = []

    def operate(_):
        made.append(NestedVM(mem, vcpus=2, teardown=teardown))

    def after(_, failed):
        if not failed:
            vm = made.pop()
            vm.host.map(RAM, HOST, M)
            vm.vcpus[1].load(0, 0, hcr=0)
            assert vm.vcpus[1].fault(RAM).kind == MAPPED
            vm.check()
        assert not made

    assert in_turn(lambda: None, operate, after) > 10
    assert in_turn(lambda: None, operate, after, ALL) > 10
    mem.remove(RAM)  # nobody holds on to it


@pytest.mark.parametrize("how", [{"size": M}, {"size": M, "device": True}, {"buffer": bytearray(M)}])
def test_add_region(how):
    def after(mem, failed):
        assert [r.start for r in mem.regions] == ([RAM] if failed else [RAM, DEVICE])
        if failed:
            mem.add(DEVICE, **how)
        mem.remove(RAM)
        mem.add(RAM, M)
        mem.write64(RAM, 5)
        assert mem.read64(RAM) == 5

    def prepare():
        mem = s2shadow.GuestMemory()
        mem.add(RAM, M)
        return mem

    assert in_turn(prepare, lambda mem: mem.add(DEVICE, **how), after) >= 1


def test_remove_region():
    def after(mem, failed):
        assert len(mem.regions) == failed
        if failed:
            mem.remove(RAM)

    def prepare():
        mem = s2shadow.GuestMemory()
        mem.add(RAM, M)
        return mem

    assert in_turn(prepare, lambda mem: mem.remove(RAM), after) == 1


# An engine at work


def busy(teardown="reverse-map", **options):
    """Two contexts with pages and blocks, under a bound that is never reached but asked."""
    r = Rig(teardown=teardown, max_table_bytes=1 << 40, **options)
    r.tables.map_range(0, DATA, 64 * PAGE)
    r.tables.map_range(2 * M, RAM + 4 * M, 2 * M, level=2)
    r.tables.map(G, DATA)
    for vmid in (2, 1):
        r.load(vmid)
        for ipa in (0, PAGE, 2 * M):
            assert r.fault(ipa, WRITE).kind == MAPPED
    r.vm.take_tlbis()
    return r


def goes_on(r):
    """The engine is whole, and the next of everything works."""
    r.vm.check()
    r.vm.host.protect(DATA, DATA + 2 * M, "rwx")
    for ipa, cipa in ((0, DATA), (PAGE, DATA + PAGE), (2 * M, RAM + 4 * M), (G, DATA)):
        f = r.fault(ipa)
        if f.kind == s2shadow.HOST_FAULT:  # the block went
            r.vm.host.map(cipa & -2 * M, HOST + (cipa & -2 * M), 2 * M)
            f = r.fault(ipa)
        assert f.kind in (HIT, MAPPED) and f.cipa == cipa
    assert r.fault(5 * G).kind == L1_FAULT
    r.vm.host.map(FAR, HOST + FAR, PAGE)
    r.vm.log_dirty(RAM, RAM + RAM_SIZE)
    assert r.fault(PAGE, WRITE).kind == MAPPED
    assert np.unpackbits(r.vm.dirty_log(RAM, RAM + RAM_SIZE)).sum() >= 1
    r.vm.log_dirty(RAM, RAM + RAM_SIZE, on=False)
    assert r.vm.unmap(DATA, DATA + 2 * M).leaves >= 1
    r.vcpu.tlbi("ALLE1IS")
    r.vm.check()
    assert r.vm.stats.live == 0


def fault_page(r):
    r.fault(5 * PAGE)
    r.fault(G)


def fault_block(r):
    r.load(3)
    r.fault(2 * M)


def fault_batch(r):
    r.load(3)
    got = r.vcpu.fault_many(np.array([0, PAGE, 2 * M, G, 9 * PAGE], np.uint64), READ)
    assert set(got["kind"].tolist()) <= {MAPPED, HIT, NO_MEMORY}
    done = got[got["kind"] != NO_MEMORY]
    assert (done["pa"] == HOST + done["cipa"]).all()
    if len(done) < len(got):
        raise MemoryError


def write_logged(r):
    """A write fault that splits the host's block."""
    r.vm.log_dirty(RAM, RAM + RAM_SIZE)
    assert r.fault(3 * PAGE, WRITE).kind in (MAPPED, s2shadow.HOST_FAULT)


def replace(r):
    """L1 turns a block into pages of other memory."""
    r.tables.map_range(2 * M, RAM + 6 * M, 4 * PAGE)
    r.tables.unmap(2 * M, 2)
    r.tables.map(2 * M, RAM + 8 * M, 2)
    r.fault(2 * M, s2shadow.EXEC)
    r.tables.set(r.tables.slot(2 * M, 2), 0)
    r.tables.map(2 * M, RAM + 4 * M)
    r.vcpu.tlbi("VMALLS12E1IS")
    r.fault(2 * M)


def tlbis(r):
    for op in ("IPAS2E1IS", "RIPAS2E1IS", "VMALLE1IS", "VMALLS12E1IS", "ALLE1IS"):
        r.vcpu.tlbi(op, 1 << 46)
    r.vm.take_tlbis()


def populate_by_call(r):
    r.vm.unmap(DATA, DATA + 2 * M)
    r.vm.host.populate = lambda cipa, access: HostMapping(HOST + (cipa & -PAGE), PAGE)
    r.fault(0)


def populate_linear(r):
    r.vm.unmap(DATA, DATA + 2 * M)
    r.vm.host.populate = s2shadow.Linear(HOST, max_block=PAGE)
    r.fault(0)


def recycle(r):
    for vmid in range(3, 9):
        r.load(vmid)
        r.fault(0)


OPERATIONS = {
    "fault": fault_page,
    "block": fault_block,
    "batch": fault_batch,
    "map": lambda r: r.vm.host.map(1 << 40, 1 << 40, 3 * PAGE),
    "remap": lambda r: r.vm.host.map(DATA + PAGE, HOST, 5 * PAGE),
    "unmap": lambda r: r.vm.unmap(DATA + PAGE, DATA + 2 * PAGE, "split"),
    "protect": lambda r: r.vm.host.protect(DATA + PAGE, DATA + 2 * PAGE, "r"),
    "log": lambda r: r.vm.log_dirty(RAM, RAM + RAM_SIZE),
    "write": write_logged,
    "age": lambda r: r.vm.age(RAM, RAM + RAM_SIZE),
    "replace": replace,
    "tlbi": tlbis,
    "populate": populate_by_call,
    "linear": populate_linear,
    "recycle": recycle,
}
NOTHING_TAKEN = {"age", "tlbi"}


@pytest.mark.parametrize("count", [1, ALL], ids=["one", "all"])
@pytest.mark.parametrize("teardown", TEARDOWNS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_engine(name, teardown, count):
    """Whatever cannot be had, the engine is whole and the next operation works."""
    def after(r, failed):
        if failed and name in ("map", "remap"):
            assert r.host_leaves() == leaves
        r.load(1)
        goes_on(r)

    def prepare():
        r = busy(teardown)
        leaves[:] = r.host_leaves()
        return r

    leaves = []
    points = in_turn(prepare, OPERATIONS[name], after, count)
    assert points == 0 if name in NOTHING_TAKEN else points > 0


@pytest.mark.parametrize("count", [1, ALL], ids=["one", "all"])
def test_markers(count):
    """A page with 200 aliases: the oldest leaf's address is found with markers or without."""
    def prepare():
        r = Rig(max_table_bytes=1 << 40)
        r.tables.next = RAM + M
        for n in range(200):
            r.tables.map(n * PAGE, DATA)
        assert (r.vcpu.fault_many(np.arange(200, dtype=np.uint64) * PAGE)["kind"] == MAPPED).all()
        return r

    def operate(r):
        assert r.fault(0).cipa == DATA
        assert r.vcpu.translate(7 * PAGE).cipa == DATA

    def after(r, failed):
        assert not failed
        r.vm.check()
        assert r.vm.unmap(DATA, DATA + PAGE).leaves == 200
        r.vm.check()

    assert in_turn(prepare, operate, after, count) > 2


@pytest.mark.parametrize("count", [1, ALL], ids=["one", "all"])
def test_interval_overlap(count):
    """Aliases under an interval map: ranges merge, or the leaf is not made."""
    def prepare():
        r = Rig(teardown="interval-map", max_table_bytes=1 << 40)
        r.tables.map_range(0, DATA, 8 * PAGE)
        r.tables.map_range(G, DATA, 2 * M, level=2)
        r.fault(0)
        return r

    def operate(r):
        r.fault(PAGE)
        r.fault(G + 3 * PAGE)

    def after(r, failed):
        r.vm.check()
        assert r.fault(PAGE).kind in (HIT, MAPPED) and r.fault(G).kind in (HIT, MAPPED)
        r.vm.unmap(DATA, DATA + 2 * M)
        r.vm.check()
        assert r.vm.stats.live == 0

    assert in_turn(prepare, operate, after, count) >= 4


def captured_host():
    """A host table with pages and blocks, as another engine has it."""
    other = Rig()
    other.vm.unmap(DATA + 4 * PAGE, DATA + 6 * PAGE, "split")
    other.vm.host.map(1 << 41, 1 << 41, 2 * M)
    addresses, pages = other.vm.tables(None)
    vtcr = canonical_vtcr(PAGE, 48) | 5 << 16 | 1 << 31
    return addresses, pages, int(addresses[0]), vtcr, other.host_leaves()


@pytest.mark.parametrize("count", [1, ALL], ids=["one", "all"])
def test_load_host(count):
    """The captured table, or all as it was."""
    addresses, pages, vttbr, vtcr, leaves = captured_host()

    def after(r, failed):
        assert r.host_leaves() == (before if failed else leaves)
        r.vm.check()
        r.vm.host.load(addresses, pages, vttbr, vtcr)
        assert r.host_leaves() == leaves
        r.vm.check()

    def prepare():
        r = Rig(host=False, max_table_bytes=1 << 40)
        r.vm.host.map(DATA, HOST, 4 * PAGE)
        before[:] = r.host_leaves()
        return r

    before = []
    assert in_turn(prepare, lambda r: r.vm.host.load(addresses, pages, vttbr, vtcr), after, count) >= 3


def test_load_host_over_the_bound():
    """A bound that is too small for the whole table: nothing of it is there, as large as it is."""
    addresses, pages, vttbr, vtcr, leaves = captured_host()
    r = Rig(host=False, max_table_bytes=320 * K, contexts=1)
    r.vm.host.map(DATA, HOST, PAGE)
    for n in range(64):
        try:
            r.vm.host.map((1 << 40) + (n << 30), 0, PAGE)
        except MemoryError:
            break
    before = r.host_leaves()
    with pytest.raises(MemoryError):
        r.vm.host.load(addresses, pages, vttbr, vtcr)
    assert r.host_leaves() == before
    assert r.fault(0).kind == L1_FAULT
    r.vm.check()
    for n in range(64):
        r.vm.unmap((1 << 40) + (n << 30), (1 << 40) + (n << 30) + PAGE)
    r.vm.host.load(addresses, pages, vttbr, vtcr)
    assert set(leaves) <= set(r.host_leaves())


def test_list_leaves():
    """``leaves`` grows its list."""
    r = Rig()
    r.tables.next = RAM + M
    r.tables.map_range(0, DATA, 3000 * PAGE)
    cfg = s2shadow.Stage2Config(r.tables.vttbr(), r.tables.vtcr)
    points = in_turn(lambda: None, lambda _: s2shadow.leaves(r.mem, cfg), lambda *_: None)
    assert points == 3  # 1024, 2048, 4096 rows
    assert len(s2shadow.leaves(r.mem, cfg)) == 3000


def test_refuse_counts():
    """The hook refuses what it says, and says how often it was asked."""
    mem = s2shadow.GuestMemory()
    refuse(2)
    mem.add(RAM, M, device=True)
    with pytest.raises(MemoryError):
        mem.add(DEVICE, M, device=True)
    assert refuse(0) == 2
    mem.add(DEVICE, M, device=True)
    assert refuse(0) == 0


# Python's objects


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="from 3.12 on CPython itself crashes on refused allocations")
@pytest.mark.parametrize("name", OPERATIONS)
def test_python_objects(name):
    """Each of Python's allocations refused in turn; the engine is whole whatever is lost on the way back."""
    testcapi = pytest.importorskip("_testcapi", reason="this Python has no _testcapi")
    r, n, calm, failures = busy(), 0, 0, 0
    while calm < 8:
        n += 1
        assert n < 2000
        failed = False
        testcapi.set_nomemory(n, n + 1)
        try:
            OPERATIONS[name](r)
        except MemoryError:
            failed = True
        finally:
            testcapi.remove_mem_hooks()
        calm = 0 if failed else calm + 1
        failures += failed
        r.load(1)
        if failed:
            goes_on(r)
            r = busy()
    goes_on(r)
    assert failures
