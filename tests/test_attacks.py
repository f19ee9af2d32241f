"""What an L1 can make L0 spend: bytes, leaves and steps are counted here; times are in ``bench/attacks.py``."""

import time

import numpy as np
import pytest

import s2shadow
from beside import beside
from rig import DATA, HOST, PAGE, RAM, RAM_SIZE, G, K, M, Rig, Tables, flags
from s2shadow import HIT, HOST_FAULT, MAPPED, MISS, NO_MEMORY, PTW, READ, RETRY, WRITE
from s2shadow._floor import pauses
from s2shadow.vmem import refuse

MANY = 10_000  # more leaves than two sections drop or change
BLOCK = 2 * M
TOGETHER = np.arange(MANY, dtype=np.uint64)


def aliased(count=MANY, size=PAGE, **options):
    """One page or block of DATA under ``count`` nested addresses, all of them writable leaves."""
    r = Rig(**options)
    r.tables.next = RAM + 8 * M
    target, level = (DATA, 3) if size == PAGE else (RAM + 2 * M, 2)
    for n in range(count):
        r.tables.map(n * size, target, level)
    r.touch = np.arange(count, dtype=np.uint64) * size
    assert (r.vcpu.fault_many(r.touch, WRITE)["kind"] == MAPPED).all()
    return r


def perms(r):
    return set(r.shadow()["perm"].tolist())


# More aliases than one section should touch


def test_protect_aliases():
    """All are narrowed, none is dropped, and they come back."""
    r = aliased()
    assert r.vm.host.protect(DATA, DATA + PAGE, "rx").leaves == 0
    assert len(r.shadow()) == MANY and perms(r) == {0x25}
    r.vm.check()
    assert (r.vcpu.fault_many(r.touch, WRITE)["kind"] == HOST_FAULT).all()
    r.vm.host.protect(DATA, DATA + PAGE, "rwx")
    assert (r.vcpu.fault_many(r.touch, WRITE)["kind"] == MAPPED).all()
    r.vm.check()


def test_protect_part_of_aliased_block():
    """A block that is split under ten thousand shadows of it: they go."""
    r = aliased(size=BLOCK)
    assert r.vm.host.protect(DATA, DATA + PAGE, "r").leaves == MANY
    r.vm.check()
    assert (r.vcpu.fault_many(r.touch, READ)["kind"] == MAPPED).all()
    assert perms(r) == {1}
    r.vm.check()


def test_protect_small_leaves_of_a_block():
    """A part of a host block is taken W from, under ten thousand pages that lie inside that part."""
    r = aliased()
    assert r.vm.host.protect(DATA, DATA + 2 * PAGE, "r").leaves == 0
    assert perms(r) == {1} and len(r.shadow()) == MANY
    r.vm.check()


def test_log_aliases():
    """A page that is logged: no alias keeps W, each write marks it, none is lost."""
    r = aliased()
    assert r.vm.log_dirty(RAM, RAM + RAM_SIZE).leaves == 0
    assert perms(r) == {0x25}
    r.vm.check()
    for _ in range(2):
        assert (r.vcpu.fault_many(r.touch, WRITE)["kind"] == MAPPED).all()
        assert perms(r) == {0x27}
        r.vm.check()
        assert flags(r.vm.dirty_log(DATA, DATA + 4 * PAGE), 4) == [True, False, False, False]
        assert perms(r) == {0x25}
        r.vm.check()
    assert not r.vm.dirty_log(RAM, RAM + RAM_SIZE).any()


def test_write_to_logged_block():
    """The fault splits the host's block and drops every shadow of the whole."""
    r = aliased(size=BLOCK)
    r.vm.log_dirty(RAM, RAM + RAM_SIZE)
    f = r.fault(5 * PAGE, WRITE)
    assert (f.kind, f.size, f.pa) == (MAPPED, PAGE, HOST + DATA + 5 * PAGE)
    assert r.leaves() == [(5 * PAGE, DATA + 5 * PAGE, PAGE)]
    assert flags(r.vm.dirty_log(DATA, DATA + 8 * PAGE), 8) == [n == 5 for n in range(8)]
    r.vm.check()


def test_age_aliases():
    r = aliased()
    r.vm.host.protect(DATA, DATA + PAGE, "rw")  # a page of its own
    r.vm.age(RAM, RAM + RAM_SIZE)
    assert not r.shadow()["young"].any()
    r.vcpu.fault(int(r.touch[17]))
    assert flags(r.vm.test_young(DATA, DATA + 2 * PAGE), 2) == [True, False]
    assert flags(r.vm.age(DATA, DATA + 2 * PAGE), 2) == [True, False]
    assert not r.shadow()["young"].any() and not r.vm.test_young(RAM, RAM + RAM_SIZE).any()
    r.vm.check()


def test_a_long_change_ends_at_its_end():
    """Behind ten thousand aliases, a page without any, where the range ends: the page behind it is left alone."""
    r = aliased()
    r.tables.map(MANY * PAGE, DATA + 2 * PAGE)
    assert r.fault(MANY * PAGE, WRITE).kind == MAPPED
    r.vm.age(DATA, DATA + 2 * PAGE)
    assert [row["ipa"].item() for row in r.shadow() if row["young"]] == [MANY * PAGE]
    r.vm.log_dirty(DATA, DATA + 2 * PAGE)
    r.vm.host.protect(DATA, DATA + 2 * PAGE, "r")
    r.vm.check()


@pytest.mark.parametrize("size", [PAGE, BLOCK])
def test_remap_aliases(size):
    """Another page of the host's in its place: every shadow goes, and is counted."""
    r = aliased(size=size)
    assert r.vm.host.map(DATA, HOST, size).leaves == MANY
    assert len(r.shadow()) == 0
    assert (r.vcpu.fault_many(r.touch, READ)["pa"] == HOST).all()
    r.vm.check()


def test_replace_a_gigabyte():
    """L1 puts a block where ten thousand pages are: one fault, and they are gone."""
    mem = s2shadow.GuestMemory()
    mem.add(0, 4 * G)
    vm = s2shadow.NestedVM(mem)
    vm.host.map(0, 1 << 40, 4 * G)
    tables = Tables(mem.read64, mem.write64, 3 * G)
    tables.map_range(0, G, MANY * PAGE)
    vm.vcpus[0].load(tables.vttbr(), tables.vtcr)
    assert (vm.vcpus[0].fault_many(TOGETHER * PAGE)["kind"] == MAPPED).all()
    tables.set(tables.slot(0, 1), tables.leaf(2 * G, 1))
    f = vm.vcpus[0].fault(MANY * PAGE)
    assert (f.kind, f.size, f.cipa) == (MAPPED, G, 2 * G + MANY * PAGE)
    assert vm.stats.live == 1 and vm.stats.replaced == 1
    vm.check()


@pytest.mark.parametrize("teardown", ["reverse-map", "interval-map"])
def test_faults_go_on_beside(teardown):
    """While ten thousand aliases are narrowed and aged, a vCPU elsewhere is served; in the range it hears RETRY at
    most, and what it is let do is what the host allows then."""
    r = aliased(vcpus=2, contexts=4, teardown=teardown)
    other = r.new_tables()
    other.map(0, DATA + 4 * M)
    other.map(PAGE, DATA)
    r.load(7, other, n=1)
    kinds = {0: set(), PAGE: set()}

    def fault():
        for ipa, seen in kinds.items():
            seen |= set(r.vm.vcpus[1].fault_many(np.full(20, ipa, np.uint64), WRITE)["kind"].tolist())
            r.vm.vcpus[1].tlbi("IPAS2E1IS", ipa >> 12)

    with beside(fault):
        for n in range(20):
            r.vm.host.protect(DATA, DATA + PAGE, "rx" if n % 2 else "rwx")
            r.vm.age(DATA, DATA + PAGE)
    assert kinds[0] <= {HIT, MAPPED} and kinds[0]
    assert kinds[PAGE] <= {HIT, MAPPED, HOST_FAULT, RETRY}
    r.vm.check()
    assert not (r.shadow()["perm"] & 2).any()


def unmap_and_refill(r):
    r.vm.unmap(DATA, DATA + PAGE)
    r.vm.host.map(DATA, HOST + DATA, PAGE)
    r.vcpu.fault_many(r.touch, WRITE)


@pytest.mark.parametrize(
    ("change", "access"),
    [
        (lambda r: r.vm.test_young(DATA, DATA + PAGE), READ),
        (lambda r: r.vm.test_young(DATA, DATA + PAGE), READ | PTW),
        (unmap_and_refill, READ),
    ],
    ids=["plain", "not plain", "unmap"],
)
def test_retry_amid_a_long_change(change, access):
    """While a page with ten thousand aliases is changed in sections, a fault on it hears RETRY: on a leaf that is live
    all the time, and on one that L1 just invalidated, which does not come back meanwhile."""
    r = aliased(vcpus=2, contexts=4)
    vcpu, other = r.vm.vcpus[1], r.new_tables()
    other.map_range(0, DATA, 2 * PAGE)      # the second keeps the leaf table
    other.map(2 * PAGE, DATA)
    r.load(7, other, n=1)
    assert (vcpu.fault_many([0, PAGE, 2 * PAGE])["kind"] == MAPPED).all()
    live, gone = set(), set()

    def fault():
        answers = [vcpu.translate(0).kind, vcpu.fault(0).kind, vcpu.translate(0).kind]
        if answers[0] == answers[2] == HIT:
            live.add(answers[1])
        vcpu.tlbi("IPAS2LE1IS", 2)
        gone.add(vcpu.fault(2 * PAGE, access).kind)

    wanted = [gone] if change == unmap_and_refill else [gone, live]
    with beside(fault) as failures:
        until = time.monotonic() + 30
        while not all(RETRY in kinds for kinds in wanted) and not failures and time.monotonic() < until:
            change(r)
    assert all(RETRY in kinds for kinds in wanted)
    assert gone <= {MAPPED, HOST_FAULT, RETRY}
    # a whole change, with the refill, may come between two answers: then the leaf between them is a new one
    assert live <= ({HIT, MAPPED, RETRY} if change == unmap_and_refill else {HIT, RETRY})
    r.vm.check()


def test_leaves_go_while_they_are_narrowed():
    """L1 invalidates the very leaves that are being narrowed: none keeps W, none is lost from the books."""
    r = aliased(vcpus=2, contexts=4)
    r.load(1, n=1)
    rng = np.random.default_rng(1)

    def churn():
        for ipa in rng.choice(r.touch, 50):
            r.vm.vcpus[1].tlbi("IPAS2E1IS", int(ipa) >> 12)
        r.vm.vcpus[1].fault_many(rng.choice(r.touch, 200), READ)

    with beside(churn):
        for n in range(30):
            r.vm.host.protect(DATA, DATA + PAGE, "rwx" if n % 2 else "r")
            r.vcpu.fault_many(r.touch, WRITE)
            if n % 2 == 0:
                assert not (r.shadow()["perm"] & 2).any()
            r.vm.age(DATA, DATA + PAGE)
            r.vm.check()
    r.vm.check()
    r.vm.unmap(DATA, DATA + PAGE)
    assert r.vm.stats.live == 0


@pytest.mark.parametrize("aliases", [5119, 6000])
def test_no_block_comes_back_while_its_page_is_protected(aliases):
    """A page of a block is taken W from, under so many shadows that others are let in, also just before the end; an
    access to another page of the block meanwhile must not bring a leaf over all of it. So what goes is the one block
    leaf that was there before, if it was."""
    r = aliased(aliases, vcpus=2, contexts=4)
    last = (aliases * PAGE // BLOCK + 1) * BLOCK
    r.tables.map(last, DATA, 2)
    r.load(1, n=1)
    elsewhere = np.full(32, last + 16 * PAGE, dtype=np.uint64)
    until = time.monotonic() + 10
    with beside(lambda: r.vm.vcpus[1].fault_many(elsewhere, READ), r.vm.check):
        for n in range(40):
            r.vm.host.map(DATA, HOST + DATA + (n % 2) * G, BLOCK)
            r.vcpu.fault_many(r.touch, READ)
            assert r.vm.host.protect(DATA, DATA + PAGE, "r").leaves <= 1
            assert (r.shadow()["size"] == PAGE).all()
            if time.monotonic() > until:    # a build that pauses for each two leaves does a check at each
                break
    r.vm.check()


def test_a_tlbi_ends_while_others_fault():
    """Other vCPUs of the same L1 fault in again what a TLBI drops: it passes each address once, and ends."""
    pages, others = 8_000, 3
    r = Rig(vcpus=1 + others, contexts=4)
    r.tables.next = RAM + 8 * M
    r.tables.map_range(0, DATA, pages * PAGE)
    touch = np.arange(pages, dtype=np.uint64) * PAGE
    for n in range(1, 1 + others):
        r.load(1, n=n)
    with beside(*(lambda vcpu=r.vm.vcpus[n]: vcpu.fault_many(touch, READ) for n in range(1, 1 + others))):
        for _ in range(8):
            r.vcpu.fault_many(touch, READ)
            for op in ("VMALLS12E1IS", "ALLE1"):
                assert r.vcpu.tlbi(op).removed <= pages
    r.vm.check()


def test_a_tlbi_of_many_contexts_lets_others_in():
    """No context has more leaves than a section may remove; all of them have."""
    contexts, pages = 20, 1000
    r = Rig(contexts=contexts + 1)
    r.tables.map_range(0, DATA, pages * PAGE)
    for vmid in range(1, contexts + 1):
        r.load(vmid)
        r.vcpu.fault_many(TOGETHER[:pages] * PAGE, READ)
    before = pauses(r.vm._state())
    assert r.vcpu.tlbi("ALLE1IS").removed == contexts * pages
    assert pauses(r.vm._state()) - before >= contexts * pages // 1024
    r.vm.check()


@pytest.mark.parametrize("block", [False, True])
def test_a_tlbi_of_a_page_in_many_contexts_lets_others_in(block):
    """One VMID under more tables than a section may remove leaves: 2,000 contexts with one leaf each there, and with a
    block elsewhere, which makes a search for blocks over the page necessary."""
    contexts = 2000
    r = Rig(contexts=contexts)
    r.tables.map(0, DATA)
    if block:
        r.tables.map(1 * G, DATA, 2)
    level2 = [r.tables.slot(at, 2) & -PAGE for at in (0, 1 * G)]
    for n in range(contexts):
        root = RAM + 8 * M + n * PAGE
        for i in range(1 + block):
            r.mem.write64(root + 8 * i, level2[i] | 3)
            r.vcpu.load(root | 1 << 48, r.tables.vtcr)
            assert r.fault(i * G).kind == MAPPED
    before = pauses(r.vm._state())
    assert r.vcpu.tlbi("IPAS2E1IS", 0).removed == contexts
    assert pauses(r.vm._state()) - before >= contexts // 1024
    r.vm.check()


@pytest.mark.parametrize("cold", [False, True])
def test_a_mapping_at_the_bound_lets_others_in(cold):
    """The host maps what takes a table for each 2 MiB, and the shadows have all the room."""
    r = Rig(max_table_bytes=6 * M, contexts=1)
    table = r.tables.slot(0, 3) & -PAGE
    r.tables.map_range(0, DATA, 2 * M)
    for at in range(0, 2 * G, 2 * M):
        r.tables.set(r.tables.slot(at, 2), table | 3)
    r.vcpu.fault_many(np.arange(0, 2 * G, PAGE, dtype=np.uint64), READ)
    if cold:
        r.vcpu.put()
    before, removed = pauses(r.vm._state()), r.vm.stats.removed
    r.vm.host.map(1 << 36, (1 << 36) + PAGE, 1 * G)
    removed = r.vm.stats.removed - removed
    assert removed > 20 * 1024
    assert pauses(r.vm._state()) - before >= removed // 1600
    r.vm.check()


@pytest.mark.parametrize("part", ["hole", "head", "tail"])
def test_no_write_gets_through_while_logging_begins(part):
    """What log_dirty has nothing to do for in a stretch, since nothing is mapped there, or has no W since an earlier
    log, gets no W either while it narrows three hundred thousand shadows of the rest."""
    for _ in range(5):
        r = Rig(host=False, vcpus=2, contexts=4)
        vm, tables = r.vm, r.tables
        tables.next = RAM + 8 * M
        start = RAM + 40 * M
        many, other, end = start + BLOCK, start, start + 2 * BLOCK
        vm.host.map(many, HOST + many, BLOCK)
        if part == "hole":
            vm.host.populate = "linear"
        else:
            if part == "tail":
                start, other, end = many, end, end + M
            vm.host.map(other, HOST + other, BLOCK)
            vm.log_dirty(other, other + BLOCK)
            vm.log_dirty(other, other + BLOCK, on=False)
        for n in range(512):
            tables.map(n * PAGE, many)
        table = tables.slot(0, 3) & -PAGE
        for at in range(0, 600 * BLOCK, BLOCK):
            tables.set(tables.slot(at, 2), table | 3)
        tables.map(8 * G, other)
        r.load(n=1)
        r.vcpu.fault_many(np.arange(0, 600 * BLOCK, PAGE, dtype=np.uint64), WRITE)
        before, kinds = pauses(vm._state()), []

        def write_meanwhile(vm=vm, before=before, kinds=kinds):
            if not kinds and pauses(vm._state()) > before + 2:
                kinds.append(vm.vcpus[1].fault(8 * G, WRITE).kind)
        with beside(write_meanwhile):
            vm.log_dirty(start, end)
        vm.check()
        written = vm.vcpus[1].translate(8 * G, WRITE).kind == HIT
        assert flags(vm.dirty_log(other, other + PAGE), 1) == [written]


def test_checks_beside_faults_at_the_bound():
    """A fault that finds no memory leaves a table for its second attempt to tidy: in between that is no finding."""
    r = Rig(vcpus=2, contexts=2, max_table_bytes=1 * M)
    table = r.tables.slot(0, 3) & -PAGE
    r.tables.map_range(0, DATA, 2 * M)
    ipas = np.arange(0, 1 * G, 2 * M, dtype=np.uint64)
    for at in range(0, 1 * G, 2 * M):
        r.tables.set(r.tables.slot(at, 2), table | 3)
    r.vcpu.fault_many(ipas, READ)
    assert r.vm.stats.evictions
    with beside(lambda: r.vcpu.fault_many(ipas, READ)) as failures:
        for _ in range(10_000):
            r.vm.check()
            assert not failures
    r.vm.check()


def test_unmapped_meanwhile():
    """Accesses to what a long unmap has in hand, where nothing was mapped either: RETRY until it is done, then populate
    is asked; never that nothing can be mapped."""
    r = Rig(vcpus=2, contexts=4, host=False)
    r.vm.host.populate = s2shadow.Linear(HOST, max_block=PAGE)
    r.tables.next = RAM + 8 * M
    for n in range(MANY):
        r.tables.map(n * PAGE, DATA)
    r.tables.map(MANY * PAGE, DATA + PAGE)
    r.load(1, n=1)
    elsewhere = np.full(32, MANY * PAGE, dtype=np.uint64)
    seen = set()

    def beside_it():
        rows = r.vm.vcpus[1].fault_many(elsewhere, READ)
        seen.update(rows["kind"].tolist())
        without = rows[rows["kind"] == RETRY]
        assert not without["pa"].any() and not without["size"].any() and not without["perm"].any()
    with beside(beside_it):
        for n in range(3_000):
            r.vcpu.fault_many(TOGETHER * PAGE, READ)
            r.vm.unmap(DATA + PAGE, DATA + 2 * PAGE)
            r.vm.unmap(DATA, DATA + 2 * PAGE)
            if n >= 30 and RETRY in seen:
                break
    assert {MAPPED, RETRY} <= seen <= {MAPPED, RETRY, HIT}
    r.vm.check()


def test_aliases_without_room_for_markers():
    """A leaf deep in a list that cannot be marked goes, and what comes back stands at the front: no search of all that
    stand before it, however often."""
    count = 3 * MANY
    r = aliased(count)
    last = (count - 1) * PAGE
    r.vm.unmap(DATA + PAGE, DATA + 2 * PAGE)        # the host's block is split already
    refuse(1, 1 << 40)                      # no memory for anything from now on
    try:
        assert r.vcpu.translate(0, READ).kind == MISS
        assert [r.vcpu.fault(ipa, READ).kind for ipa in (0, 0, PAGE, PAGE, last)] == [MAPPED, HIT, MAPPED, HIT, HIT]
        assert r.vcpu.translate(last, READ).kind == HIT and r.vm.stats.live == count
        r.vm.check()
        # where a pause was cannot be found again: dropping is always right
        assert r.vm.host.protect(DATA, DATA + PAGE, "r").leaves == count and r.vm.stats.live == 0
    finally:
        refuse(0)
    r.vm.check()


# Bytes


def assert_bounded(r, limit):
    assert r.vm.stats.memory_bytes <= limit


@pytest.mark.parametrize("populate", ["linear", "callable", "none"])
def test_writes_to_logged_blocks_without_room(populate):
    """A write to a logged block splits it. Where no table can be had for that the block goes, and the fault ends: it
    does not map the block again and again."""
    with pytest.raises(ValueError, match="at least") as least:
        s2shadow.NestedVM(s2shadow.GuestMemory(), contexts=1, max_table_bytes=1)
    limit = int(str(least.value).partition("at least ")[2].split()[0])
    r = Rig(host=False, contexts=1, max_table_bytes=limit)
    blocks = range(RAM, RAM + RAM_SIZE, BLOCK)
    asked = []

    def block_at(cipa, access):
        asked.append(cipa)
        return s2shadow.HostMapping(HOST + cipa & -BLOCK, BLOCK)
    if populate == "none":
        for at in blocks:
            r.vm.host.map(at, HOST + at, BLOCK)
    else:
        r.vm.host.populate = s2shadow.Linear(HOST) if populate == "linear" else block_at
    r.load(hcr=0)                           # stage 2 off: L2's addresses are L1's
    r.vm.log_dirty(RAM, RAM + RAM_SIZE)
    kinds = r.vcpu.fault_many(np.array(blocks, dtype=np.uint64), WRITE)["kind"].tolist()
    assert set(kinds) == {MAPPED, NO_MEMORY}
    assert len(asked) <= len(blocks)
    assert_bounded(r, limit)
    r.vm.check()
    dirty = flags(r.vm.dirty_log(RAM, RAM + RAM_SIZE), RAM_SIZE // PAGE)[:: BLOCK // PAGE]
    assert all(dirty[n] for n, kind in enumerate(kinds) if kind == MAPPED)


@pytest.mark.parametrize("teardown", ["reverse-map", "interval-map", "blow-away", "blow-away-lean"])
def test_scattered_pages_under_a_bound(teardown):
    """Each access takes tables of its own: as many evictions as it needs, never more bytes, never a refusal."""
    limit = 700 * K
    r = Rig(max_table_bytes=limit, teardown=teardown, contexts=2)
    r.tables.next = RAM + 8 * M
    ipas = [(n * 37 % 512) * G + (n * 11 % 512) * 2 * M for n in range(600)]
    for ipa in ipas:
        r.tables.map(ipa, DATA + ipa // (2 * M) % 512 * PAGE)
        assert r.fault(ipa, WRITE).kind == MAPPED
        assert_bounded(r, limit)
    assert r.vm.stats.evictions > 100
    r.vm.check()


def test_scattered_blocks_under_a_bound():
    """Blocks stand in upper tables, which no eviction of leaf tables frees."""
    limit = 400 * K
    r = Rig(max_table_bytes=limit, contexts=1)
    r.tables.next = RAM + 8 * M
    for n in range(400):
        r.tables.map(n * G, RAM + 2 * M, 2)
        assert r.fault(n * G).kind == MAPPED
        assert_bounded(r, limit)
    assert r.vm.stats.evictions > 2
    r.vm.check()


def test_churn_of_contexts_under_a_bound():
    """Each load is another VMID: what is cold goes, the pool and the bytes stay as they are."""
    limit = 900 * K
    r = Rig(max_table_bytes=limit, contexts=4)
    r.tables.map_range(0, DATA, 64 * PAGE)
    for n in range(2000):
        r.load(1 + n % 255)
        for ipa in (0, n % 64 * PAGE):
            assert r.fault(ipa).kind in (HIT, MAPPED)
        assert_bounded(r, limit)
        assert len(r.vm.contexts) <= 4
    r.vm.check()


def test_cold_contexts_go_first():
    """At the bound the contexts that nobody runs on pay before the one in use does."""
    r = Rig(max_table_bytes=1200 * K, contexts=4)
    r.tables.next = RAM + 8 * M
    for vmid in (2, 3, 4):
        r.load(vmid)
        for n in range(20):
            r.tables.map(n * 2 * M, DATA + n * PAGE)
            r.fault(n * 2 * M)
    r.load(1)
    n = 0
    while r.vm.stats.live == 60 + n:
        r.tables.map(n * 2 * M, DATA + n * PAGE)
        r.fault(n * 2 * M)
        n += 1
    mine = next(c for c in r.vm.contexts if c.vmid == 1)
    assert mine.entries == n
    r.vm.check()


def scattered(r, pages, n=0):
    """Faults on pages, each of which takes a leaf table of its own, until one of them had to evict."""
    before = r.vm.stats.evictions
    for page in pages:
        r.tables.map(page * 2 * M, DATA + page * PAGE)
        r.fault(page * 2 * M, n=n)
        if r.vm.stats.evictions > before:
            return


def entries(r):
    return {context.vmid: context.entries for context in r.vm.contexts}


def test_the_coldest_context_goes_first():
    r = Rig(max_table_bytes=1200 * K, contexts=4)
    r.tables.next = RAM + 8 * M
    for vmid in (3, 2, 4):
        r.load(vmid)
        scattered(r, range(20))
    r.load(3)
    r.load(1)
    scattered(r, range(400))
    r.vm.check()
    left = [entries(r)[vmid] for vmid in (2, 3, 4)]
    assert left[0] < 20 and left[1:] == [20, 20]     # none, where one section takes so many


def test_what_grows_cold_is_found():
    """Nothing was cold when room was last looked for; then the vCPU goes to another context."""
    r = Rig(max_table_bytes=1200 * K, contexts=2)
    r.tables.next = RAM + 8 * M
    scattered(r, range(400))
    before = entries(r)[1]
    assert before > 100
    r.load(2)
    scattered(r, range(400))
    r.vm.check()
    assert entries(r)[1] < before


def test_a_large_context_is_recycled():
    """More leaves than one section drops: the next owner finds none."""
    r = aliased(contexts=1)
    r.load(2)
    assert len(r.shadow()) == 0 and r.vm.stats.live == 0
    r.vm.check()
    assert r.vcpu.translate(0).kind != HIT


def test_contexts_in_use_pay_table_by_table():
    """At the bound, with nothing cold, one leaf table is taken at a time, whose ever it is: no context that a vCPU runs
    on is emptied, also when all tables had their turn."""
    r = Rig(vcpus=2, contexts=2, max_table_bytes=1200 * K)
    r.tables.next = RAM + 8 * M
    for n in range(600):
        r.tables.map(n * 2 * M, DATA + n * PAGE)
    r.load(2, n=1)
    for n in range(20):
        assert r.fault(n * 2 * M, n=1).kind == MAPPED
    for n in range(600):
        assert r.fault(n * 2 * M).kind == MAPPED
        assert r.vm.stats.live == 20 + n + 1 - r.vm.stats.evictions
    assert r.vm.stats.evictions > 400
    r.vm.check()


def test_eviction_looks_at_few():
    """Thousands of the host's own tables between the shadows': an eviction does not go through them."""
    r = Rig(host=False, max_table_bytes=24 * M)
    for n in range(4096):
        r.vm.host.map(RAM + n * 2 * M, HOST + n * 2 * M + PAGE, PAGE)
    r.tables.next = RAM + 8 * M
    r.vm.host.map(DATA, HOST, 64 * PAGE)
    n = 0
    while r.vm.stats.evictions < 300:
        r.tables.map(n % 4096 * 2 * M, DATA + n % 64 * PAGE)
        assert r.fault(n % 4096 * 2 * M).kind in (HIT, MAPPED)
        n += 1
    assert r.vm._evict_looked() <= 2 * r.vm.stats.evictions + 10
    r.vm.check()


def test_aliases_cost_their_own_links():
    """Bytes grow with the leaves that live, by aliases of one page as by any others, and go with them."""
    r = aliased(1)
    few = r.vm.stats
    r = aliased(MANY)
    many = r.vm.stats
    tables = -(-MANY // 512) + 20
    assert many.memory_bytes - few.memory_bytes < tables * (2 * PAGE + 64) + MANY * 2
    assert r.vm.unmap(DATA, DATA + PAGE).leaves == MANY
    assert r.vm.stats.link_bytes == 0 and r.vm.stats.live == 0
    r.vm.check()
