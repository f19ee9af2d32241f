"""What happens on a host fault: nothing, a linear map, or what a callable says."""

import pytest

from rig import DATA, HOST, PAGE, RAM, ROM, G, K, M, Rig
from s2shadow import EXEC, HIT, HOST_FAULT, MAPPED, MMIO, NO_MEMORY, READ, WRITE, HostMapping, Linear


@pytest.fixture
def r():
    r = Rig(host=False)
    r.tables.map_range(0, DATA, 4 * M)
    r.tables.map_range(4 * M, DATA + 4 * M, 4 * M, level=2)
    return r


def test_none(r):
    """None, the default, leaves it a host fault."""
    assert r.vm.host.populate is None
    assert r.fault(0).kind == HOST_FAULT


@pytest.mark.parametrize("policy", ["linear", Linear(), Linear(offset=HOST)])
def test_linear(r, policy):
    """pa = cipa + offset, in 2 MiB blocks."""
    r.vm.host.populate = policy
    offset = HOST if policy == Linear(offset=HOST) else 0
    assert (r.fault(0x123).pa, r.fault(0x123).kind) == (DATA + offset + 0x123, HIT)
    f = r.fault(4 * M + 0x5008, WRITE)
    assert (f.kind, f.pa, f.size) == (MAPPED, DATA + offset + 4 * M + 0x5008, 2 * M)
    assert {leaf[2] for leaf in r.host_leaves()} == {2 * M}
    r.vm.check()


@pytest.mark.parametrize(("max_block", "size"), [(4 * K, 4 * K), (2 * M, 2 * M), (G, 2 * M)])
def test_linear_block_size(r, max_block, size):
    """Never larger than allowed, nor than the region."""
    r.vm.host.populate = Linear(max_block=max_block)
    r.fault(4 * M)
    assert [leaf[2] for leaf in r.host_leaves()] == [size]


def test_linear_gigabyte():
    """A region of 2 GiB and 1 GiB blocks allowed: one block."""
    r = Rig(host=False)
    r.mem.add(4 * G, 2 * G)
    r.vm.host.populate = Linear(max_block=G)
    r.tables.map(0, 5 * G, 1)
    assert r.fault(0).size == G
    assert r.host_leaves()[0][:3] == (5 * G, 5 * G, G)


def test_linear_odd_offset(r):
    """An offset that is not block-aligned allows pages only."""
    r.vm.host.populate = Linear(offset=PAGE)
    f = r.fault(4 * M)
    assert (f.size, f.pa) == (PAGE, DATA + 4 * M + PAGE)


def test_linear_keeps_what_is_there(r):
    """A page that the host mapped itself is not overwritten by a block around it."""
    r.vm.host.map(DATA + 4 * M + PAGE, 2 * HOST, PAGE)
    r.vm.host.populate = Linear(offset=HOST)
    assert r.fault(4 * M).kind == MAPPED
    assert r.fault(4 * M + PAGE).pa == 2 * HOST
    r.vm.check()


def test_linear_stays_in_the_region():
    """A region smaller than a block, or not aligned to it, gets pages."""
    r = Rig(host=False)
    r.mem.add(4 * G + M, 2 * M)
    r.vm.host.populate = Linear()
    r.tables.map(0, 4 * G, 2)
    r.tables.map(2 * M, 4 * G + 2 * M, 2)
    assert r.fault(M).size == PAGE
    assert r.fault(M - PAGE).kind == MMIO
    assert r.fault(3 * M - PAGE).size == PAGE
    assert r.fault(3 * M).kind == MMIO
    r.vm.check()


def test_linear_readonly_region(r):
    """A read-only region is populated without W."""
    r.vm.host.populate = Linear(offset=HOST)
    r.tables.map(16 * M, ROM)
    f = r.fault(16 * M, READ)
    assert f.kind == MAPPED and not f.perm & WRITE
    assert r.fault(16 * M, WRITE).kind == MMIO
    r.vm.check()


def test_linear_fresh(r):
    """fresh=True: a new PA each time, so that a stale leaf would show."""
    r.vm.host.populate = Linear(fresh=True)
    seen = set()
    for _ in range(5):
        f = r.fault(4 * M)
        assert f.kind == MAPPED
        seen.add(f.pa)
        assert r.fault(4 * M).pa == f.pa
        r.vm.unmap(DATA + 4 * M, DATA + 6 * M)
    assert len(seen) == 5
    r.vm.check()


def test_linear_fresh_no_overlap(r):
    """Fresh blocks never share a PA while they live."""
    r.vm.host.populate = Linear(fresh=True)
    for ipa in range(0, 8 * M, 64 * K):
        r.fault(ipa)
    spans = sorted((pa, pa + size) for _, pa, size, _ in r.host_leaves())
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))


def test_populates_in_batches(r):
    """A batch populates as it goes."""
    r.vm.host.populate = Linear()
    got = r.vcpu.fault_many([n * PAGE for n in range(2048)], WRITE)
    assert set(got["kind"].tolist()) <= {HIT, MAPPED}
    assert got["pa"].tolist() == [DATA + n * PAGE for n in range(2048)]


@pytest.mark.parametrize("more", range(0, 8 * K, K))
def test_linear_evicts_the_table_in_use(more):
    """At the bound the host's own table takes the room of shadows: now and then of the very leaf table that had been
    found for the leaf."""
    r = Rig(host=False, contexts=1, max_table_bytes=800 * K + more)
    r.vm.host.populate = Linear(offset=HOST, max_block=PAGE)
    r.mem.add(4 * G, 2 * G)
    for n in range(512):
        cipa = 4 * G + n * 2 * M
        r.tables.map(n * PAGE, cipa)
        f = r.vcpu.fault_many([n * PAGE])[0]
        if f["kind"] == NO_MEMORY:          # the host's table is all there is room for
            break
        assert (f["kind"], f["pa"]) == (MAPPED, HOST + cipa)
        assert (n * PAGE, cipa, PAGE) in r.leaves()
        r.vm.check()
    assert r.vm.stats.evictions > 1


# callables


def test_callable(r):
    """It is asked for the canonical address and the access, and its mapping is used."""
    asked = []

    def populate(cipa, access):
        asked.append((cipa, int(access)))
        return HostMapping(HOST + (cipa & -2 * M), 2 * M, perm="rx")

    r.vm.host.populate = populate
    f = r.fault(0x5678, EXEC)
    assert (f.kind, f.pa) == (MAPPED, HOST + DATA + 0x5678)
    assert asked == [(DATA + 0x5678, EXEC)]
    assert r.host_leaves() == [(DATA, HOST + DATA, 2 * M, f.perm)]
    assert r.fault(PAGE).kind == MAPPED and len(asked) == 1
    assert r.fault(PAGE, WRITE).kind == HOST_FAULT


def test_callable_declines(r):
    """None leaves it a host fault, and the callable is asked again next time."""
    asked = []
    r.vm.host.populate = lambda cipa, access: asked.append(cipa)
    assert [r.fault(0).kind, r.fault(0).kind] == [HOST_FAULT, HOST_FAULT]
    assert asked == [DATA, DATA]


def test_callable_raises(r):
    """Its exception comes out of the fault, and nothing was mapped."""

    def populate(cipa, access):
        raise LookupError("no frames")

    r.vm.host.populate = populate
    with pytest.raises(LookupError, match="no frames"):
        r.fault(0)
    assert len(r.shadow()) == 0 and r.host_leaves() == []
    r.vm.check()
    r.vm.host.populate = Linear()
    assert r.fault(0).kind == MAPPED


def test_callable_raises_in_batch(r):
    """An exception stops the batch at that element: those before it are done, those after it untouched."""

    def populate(cipa, access):
        if cipa == DATA + 3 * PAGE:
            raise LookupError("no frames")
        return HostMapping(HOST + cipa, PAGE)

    r.vm.host.populate = populate
    with pytest.raises(LookupError):
        r.vcpu.fault_many([n * PAGE for n in range(8)], READ)
    assert [leaf[0] for leaf in r.leaves()] == [0, PAGE, 2 * PAGE]
    r.vm.check()


@pytest.mark.parametrize("answer", [7, "normal", (HOST, PAGE), object()])
def test_callable_answers_nonsense(r, answer):
    """What is no HostMapping is an error, not a mapping."""
    r.vm.host.populate = lambda cipa, access: answer
    with pytest.raises((TypeError, ValueError)):
        r.fault(0)
    assert r.host_leaves() == []
    r.vm.check()


def test_callable_maps_itself(r):
    """It may call the engine, with no lock held: map what is missing and more, and answer None."""

    def populate(cipa, access):
        r.vm.host.map(DATA, HOST + DATA, 8 * M)

    r.vm.host.populate = populate
    f = r.fault(5 * M)
    if f.kind == HOST_FAULT:  # None is "no mapping"; the next fault finds what was mapped
        f = r.fault(5 * M)
    assert (f.kind, f.pa) == (MAPPED, HOST + DATA + 5 * M)
    r.vm.check()


def test_callable_invalidates(r):
    """It may unmap and fault elsewhere; the fault that asked starts over and ends right."""
    r.vm.host.map(DATA + PAGE, HOST, PAGE)
    r.fault(PAGE)
    calls = []

    def populate(cipa, access):
        calls.append(cipa)
        r.vm.unmap(DATA + PAGE, DATA + 2 * PAGE)
        r.vm.age(RAM, RAM + 8 * M)
        return HostMapping(2 * HOST, PAGE)

    r.vm.host.populate = populate
    f = r.fault(0)
    assert (f.kind, f.pa) == (MAPPED, 2 * HOST)
    assert calls == [DATA]
    assert r.leaves() == [(0, DATA, PAGE)]
    r.vm.check()


@pytest.mark.parametrize("others", [0, 1, 30, 31, 32, 33, 62, 63, 64, 65, 100, 200])
def test_callable_is_overtaken(r, others):
    """The host takes the very page while it is asked for, and then so many others: the answer is not mapped."""
    asked = []

    def populate(cipa, access):
        asked.append(cipa)
        if len(asked) == 1:
            r.vm.unmap(DATA, DATA + PAGE)
            for n in range(others):
                r.vm.unmap(DATA + (8 + n) * PAGE, DATA + (9 + n) * PAGE)
        return HostMapping((1 + len(asked)) * HOST, PAGE)

    r.vm.host.populate = populate
    f = r.fault(0)
    assert (f.kind, f.pa) == (MAPPED, 3 * HOST)
    assert asked == [DATA, DATA]
    r.vm.check()


@pytest.mark.parametrize("page", [0, 1, 5, 511])
def test_callable_is_overtaken_in_part(r, page):
    """The host takes one page of the block that is being resolved: the block is not mapped."""
    asked = []

    def populate(cipa, access):
        asked.append(cipa)
        if len(asked) == 1:
            r.vm.unmap(DATA + page * PAGE, DATA + (page + 1) * PAGE)
        return HostMapping((1 + len(asked)) * HOST, 2 * M)

    r.vm.host.populate = populate
    f = r.fault(7 * PAGE)
    assert (f.kind, f.pa) == (MAPPED, 3 * HOST + 7 * PAGE)
    assert asked == [DATA + 7 * PAGE] * 2
    r.vm.check()


def test_callable_changes_l1s_table(r):
    """L1's table changes while it is asked: the fault starts over, and the new address is asked for."""
    asked = []

    def populate(cipa, access):
        asked.append(cipa)
        r.tables.map(0, DATA + 7 * PAGE)
        return HostMapping(HOST + (cipa & -PAGE), PAGE)

    r.vm.host.populate = populate
    f = r.fault(0)
    assert f.kind == MAPPED
    assert f.pa == HOST + f.cipa
    assert asked[0] == DATA
    r.vm.check()


def test_callable_from_another_vcpu():
    """It may take a fault on another vCPU."""
    r = Rig(host=False, vcpus=2)
    r.tables.map_range(0, DATA, 4 * PAGE)
    r.load(2, n=1)
    inner = []

    def populate(cipa, access):
        if cipa == DATA:
            inner.append(r.fault(PAGE, n=1).kind)
        return HostMapping(HOST + cipa, PAGE)

    r.vm.host.populate = populate
    assert r.fault(0).kind == MAPPED
    assert inner == [MAPPED]
    r.vm.check()


@pytest.mark.parametrize("policy", ["quadratic", 7, object()])
def test_refused(r, policy):
    """A policy that is none: refused, and the old one stays."""
    r.vm.host.populate = Linear()
    with pytest.raises((ValueError, TypeError), match="populate"):
        r.vm.host.populate = policy
    assert r.vm.host.populate == Linear()


@pytest.mark.parametrize(("name", "value"), [("offset", 0x800), ("max_block", 3 * K), ("max_block", 0)])
def test_linear_refused(name, value):
    """Offsets and sizes that no page has."""
    with pytest.raises(ValueError, match=name):
        Linear(**{name: value})


def test_beyond_the_machine(r):
    """A PA that the machine does not have cannot be mapped."""
    r.vm.host.populate = lambda cipa, access: HostMapping(1 << 50, PAGE)
    with pytest.raises(ValueError):
        r.fault(0)
    assert r.host_leaves() == []
