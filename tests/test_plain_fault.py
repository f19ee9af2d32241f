"""Faults that are served plainly: what a vCPU remembers of the last one must never decide for one that differs.

Every test fills neighbours first, so that the fault in question finds its leaf tables known.
"""

import numpy as np
import pytest

import s2shadow
from rig import (
    AF,
    CONTIGUOUS,
    DATA,
    DEVICE,
    HOST,
    NOWHERE,
    PAGE,
    RAM,
    RAM_SIZE,
    ROM,
    XN,
    G,
    K,
    M,
    Rig,
    Tables,
    single,
    span,
)
from s2shadow import EL0, EXEC, HIT, HOST_FAULT, L1_FAULT, MAPPED, MMIO, PTW, READ, TLBI_OP_DTYPE, WRITE

PROBE = 100 * PAGE
WRAPS = 1 << 19  # forgettings after which a vCPU's short mark of them is the same again


def known(**options):
    """L1 maps 2 MiB from IPA 0; eight pages are shadowed, and their tables known to both vCPUs."""
    r = Rig(vcpus=2, contexts=4, **options)
    r.tables.map_range(0, DATA, 2 * M)
    r.load(n=1)
    for page in range(16):
        assert r.fault(page * PAGE, n=page & 1).kind == MAPPED
    return r


def answer(r, access=READ, ipa=PROBE, n=0):
    f = r.fault(ipa, access, n)
    r.vm.check()
    return f


@pytest.mark.parametrize(
    ("fields", "access", "kind", "fsc", "cipa"),
    [
        ({"cipa": DATA + 5 * M}, READ, MAPPED, 0, DATA + 5 * M),
        ({"perm": "r"}, WRITE, L1_FAULT, 0x0F, None),
        ({"perm": "r"}, READ, MAPPED, 0, DATA + PROBE),
        ({"perm": "rw"}, EXEC, L1_FAULT, 0x0F, None),
        ({"perm": "-"}, READ, L1_FAULT, 0x0F, None),
        ({"af": 0}, READ, L1_FAULT, 0x0B, None),
        ({"memattr": 1}, READ, MAPPED, 0, DATA + PROBE),
        ({"cipa": ROM}, WRITE, MMIO, 0x10, ROM),
        ({"cipa": DEVICE}, READ, MMIO, 0x10, DEVICE),
        ({"cipa": NOWHERE}, READ, MMIO, 0x10, NOWHERE),
        ({"cipa": 1 << 47}, READ, MMIO, 0x10, 1 << 47),
        ({"extra": 0xF << 55}, READ, MAPPED, 0, DATA + PROBE),
    ],
)
def test_another_leaf_beside(fields, access, kind, fsc, cipa):
    r = known()
    r.tables.map(PROBE, **{"cipa": DATA + PROBE} | fields)
    f = answer(r, access)
    assert (f.kind, f.fsc) == (kind, fsc)
    if cipa is not None:
        assert f.cipa == cipa
    if kind == MAPPED:
        config = s2shadow.Stage2Config(vttbr=r.tables.vttbr(), vtcr=r.tables.vtcr, hcr=s2shadow.HCR_VM)
        assert f.pa == HOST + f.cipa and f.perm == s2shadow.walk(r.mem, config, PROBE).perm


def test_nothing_and_a_bad_entry_beside():
    r = known()
    r.tables.set(r.tables.slot(PROBE, 3), 0)
    assert (answer(r).kind, answer(r).fsc) == (L1_FAULT, 0x07)
    r.tables.set(r.tables.slot(PROBE, 3), DATA | AF | 1)
    assert (answer(r).kind, answer(r).fsc) == (L1_FAULT, 0x07)


def test_a_contiguous_group_beside():
    r = known()
    for page in range(96, 112):
        r.tables.map(page * PAGE, DATA + 4 * M + (page - 96) * PAGE, extra=CONTIGUOUS)
    f = answer(r)
    assert (f.kind, f.cipa) == (MAPPED, DATA + 4 * M + 4 * PAGE)


@pytest.mark.parametrize("access", [READ | PTW, WRITE, EXEC, READ | WRITE | EXEC])
def test_another_access(access):
    r = known()
    f = answer(r, access)
    assert (f.kind, f.cipa, f.pa, f.size) == (MAPPED, DATA + PROBE, HOST + DATA + PROBE, PAGE)
    assert answer(r, access).kind == HIT


def test_the_host_in_between():
    """Each change of the host's page shows in the next fault on it."""
    r = known()
    page = DATA + PROBE
    r.vm.host.protect(page, page + PAGE, "rx")
    assert answer(r, WRITE).kind == HOST_FAULT
    assert answer(r, READ).kind == MAPPED
    r.vm.unmap(page, page + PAGE)
    assert answer(r).kind == HOST_FAULT
    r.vm.host.map(page, 0x70_0000_0000, PAGE)
    assert (answer(r).kind, answer(r).pa) == (MAPPED, 0x70_0000_0000)


def test_a_logged_page_beside():
    r = known()
    page = DATA + PROBE
    r.vm.log_dirty(page, page + PAGE, True)
    assert not answer(r).perm & WRITE
    assert not np.unpackbits(r.vm.dirty_log(page, page + PAGE), bitorder="little")[0]
    assert answer(r, WRITE).kind == MAPPED
    assert np.unpackbits(r.vm.dirty_log(page, page + PAGE), bitorder="little")[0]


def test_a_block_of_l1_over_known_tables():
    """L1 puts a block where its leaf table was, and says so: the old table's memory no longer counts."""
    r = known()
    r.tables.set(r.tables.slot(0, 2), r.tables.leaf(DATA + 8 * M, 2))
    r.vcpu.tlbi("IPAS2E1IS", single(PROBE))
    f = answer(r)
    assert (f.kind, f.cipa) == (MAPPED, DATA + 8 * M + PROBE)


@pytest.mark.parametrize("n", [0, 1])
def test_a_table_that_l1_moved(n):
    """Each vCPU forgets, whoever sends the TLBI."""
    r = known()
    moved = r.tables.new_table()
    r.tables.set(moved + 8 * (PROBE >> 12), r.tables.leaf(DATA + 9 * M, 3))
    r.tables.set(r.tables.slot(0, 2), moved | 3)
    r.vcpu.tlbi("IPAS2E1IS", single(PROBE))
    assert answer(r, n=n).cipa == DATA + 9 * M


def test_after_as_many_tlbis_as_marks():
    """A mark of what was forgotten has few bits: when it comes round, the oldest tables must not look like new ones."""
    r = known()
    moved = r.tables.new_table()
    r.tables.set(moved + 8 * (PROBE >> 12), r.tables.leaf(DATA + 9 * M, 3))
    r.tables.set(r.tables.slot(0, 2), moved | 3)
    tlbis = np.zeros(WRAPS // 8, dtype=TLBI_OP_DTYPE)
    tlbis["insn"], tlbis["xt"] = 0xD50C_8020, single(G)
    for _ in range(8):
        r.vm.tlbi_many(tlbis)
    assert answer(r).cipa == DATA + 9 * M


@pytest.mark.parametrize("other", [0, 1])
def test_a_table_of_another_level_at_the_same_address(other):
    """L1's table for [0, 1 GiB) was walked to a block, then one of its pages: a descriptor of a table that says in the
    bits that hardware ignores what leaves say is a table."""
    r = Rig(vcpus=2)
    r.load(n=1)                             # the other knows the shadow's table for the first pages
    r.tables.map(20 * M, RAM + M)           # so that the reverse map has a node for L1's tables
    assert r.fault(20 * M).kind == MAPPED
    attributes = r.tables.leaf(DATA, 3) & 0x7FC
    r.tables.map(2 * M, DATA + 2 * M, 2)
    for megabytes in (0, 4, 6):
        r.tables.map_range(megabytes * M, DATA, 2 * PAGE)
        slot = r.tables.slot(megabytes * M, 2)
        r.tables.set(slot, r.mem.read64(slot) | attributes)
    for ipa, n in ((2 * M, 0), (4 * M, 0), (4 * M + PAGE, 0), (0, other), (PAGE, other), (3 * PAGE, 0)):
        f = answer(r, ipa=ipa, n=n)
        assert (f.kind, f.fsc) == ((L1_FAULT, 0x07) if ipa == 3 * PAGE else (MAPPED, 0))
    assert answer(r, WRITE).kind == L1_FAULT


@pytest.mark.parametrize(
    ("granule", "bits", "sl0", "shift"), [(4 * K, 25, 0, 21), (4 * K, 32, 1, 30), (64 * K, 25, 0, 16)]
)
@pytest.mark.parametrize("batch", [False, True])
def test_beyond_the_input_size(granule, bits, sl0, shift, batch):
    """The start table ends before its page does: what L1 keeps behind it, leaves of another table, is none of it."""
    r = Rig(features=s2shadow.Features(host_granule=granule), host=False)
    r.vm.host.populate = s2shadow.Linear(HOST, max_block=1 << 30)
    leaf = 3 if granule == 64 * K else 1
    vtcr = (64 - bits) | sl0 << 6 | (granule == 64 * K) << 14 | 5 << 16
    table = RAM + M
    for n in range(min(granule // 8, 2 << bits - shift)):
        r.mem.write64(table + 8 * n, RAM & -(1 << shift) | (n % 2) << shift | AF | 0xFC | leaf)
    r.vcpu.load(1 << 48 | table, vtcr, hcr=s2shadow.HCR_VM)
    within = [n << shift for n in range(4)]
    beyond = [(1 << bits) + (n << shift) for n in range(1, 4)]
    if batch:
        got = r.vcpu.fault_many(np.array(within + beyond, dtype=np.uint64), READ)["kind"].tolist()
        got += r.vcpu.fault_many(np.array(beyond, dtype=np.uint64), READ)["kind"].tolist()
    else:
        got = [r.fault(ipa).kind for ipa in within + beyond + beyond]
    r.vm.check()
    assert all(kind in (MAPPED, MMIO) for kind in got[:4]) and MAPPED in got[:4]
    assert set(got[4:]) == {L1_FAULT}
    assert all(r.vcpu.translate(ipa).kind == s2shadow.MISS for ipa in beyond)


@pytest.mark.parametrize("nodes", range(0, 24, 3))
def test_no_node_is_left_behind(nodes):
    """L1's table that was remembered is not in use any more, without a TLBI: what it says is looked at, finds no room
    for a node of the reverse map, and the long way maps another page."""
    with pytest.raises(ValueError, match="at least") as least:
        s2shadow.NestedVM(s2shadow.GuestMemory(), contexts=1, max_table_bytes=1)
    least = int(str(least.value).partition("at least ")[2].split()[0])
    for bound in range(least, least + 2080, 520):
        mem = s2shadow.GuestMemory()
        mem.add(RAM, 8 * G)
        vm = s2shadow.NestedVM(mem, contexts=1, max_table_bytes=bound)
        tables = Tables(mem.read64, mem.write64, RAM)
        near, far = 2 * G + 16 * M, 5 * G
        for block in range(8):
            if RAM + block * G <= far:
                vm.host.map((RAM & -G) + block * G, HOST + block * G, G)
        vcpu = vm.vcpus[0]
        vcpu.load(tables.vttbr(1), tables.vtcr)
        tables.map(0, near)
        tables.map(PAGE, far)
        tables.map(64 * M, near)
        tables.map(64 * M + PAGE, near + PAGE)
        other = tables.new_table()
        tables.set(other, tables.leaf(near, 3))
        tables.set(other + 8, tables.leaf(near + 2 * PAGE, 3))
        kinds = [vcpu.fault_many(np.array([64 * M, 0], dtype=np.uint64), READ)["kind"].tolist()]
        for n in range(nodes):
            tables.map((n + 2) * PAGE, near + (n + 1) * 2 * M)
            kinds.append(vcpu.fault_many(np.array([(n + 2) * PAGE], dtype=np.uint64), READ)["kind"].tolist())
        vcpu.fault_many(np.array([64 * M + PAGE], dtype=np.uint64), READ)
        tables.set(tables.slot(0, 2), other | 3)
        vcpu.fault_many(np.array([PAGE], dtype=np.uint64), READ)
        vm.check()


def test_block_over_the_end_of_its_region():
    """L1's and the host's block begin in RAM and end beyond it: no leaf of all the block, after plain ones either."""
    mem = s2shadow.GuestMemory()
    mem.add(RAM, 32 * M + M)
    vm = s2shadow.NestedVM(mem)
    vm.host.map(RAM, HOST + RAM, 34 * M)
    tables = Tables(mem.read64, mem.write64, RAM)
    tables.map_range(0, RAM, 34 * M, 2)
    vcpu = vm.vcpus[0]
    vcpu.load(tables.vttbr(1), tables.vtcr)
    assert {(f.kind, f.size) for f in map(vcpu.fault, range(0, 32 * M, 2 * M))} == {(MAPPED, 2 * M)}
    ipas = np.array([32 * M, 33 * M], dtype=np.uint64)
    assert vcpu.fault_many(ipas, READ)["kind"].tolist() == [MAPPED, MMIO]
    assert vm.shadow(0)["size"].tolist() == [2 * M] * 16 + [PAGE]
    vm.check()


@pytest.mark.parametrize(("perm", "refused"), [("rp", EXEC | EL0), ("ru", EXEC)])
def test_execute_at_one_level_alone(perm, refused):
    """Leaves like this one were mapped for reading; who may execute there is asked for each access."""
    r = Rig()
    r.tables.map_range(0, DATA, 2 * M, perm=perm)
    for page in range(8):
        assert r.fault(page * PAGE).kind == MAPPED
    f = r.fault(PROBE, refused)
    assert (f.kind, f.fsc) == (L1_FAULT, 0x0F)
    assert r.fault(PROBE, refused ^ EL0).kind == MAPPED


def test_rom_that_was_read_before():
    """Pages of ROM are mapped, so that the reverse map has a node for them, and pages of RAM after them: a write to
    another page of ROM is none of those that are mapped alike."""
    r = known()
    rom = RAM + RAM_SIZE                    # under the same table of the host
    r.mem.add(rom, 2 * M, readonly=True)
    r.vm.host.map(rom, HOST + rom, 2 * M)
    for page in range(4):
        r.tables.map(PROBE + page * PAGE, rom + page * PAGE)
    assert (answer(r).kind, answer(r).perm & WRITE) == (MAPPED, 0)
    assert r.fault(30 * PAGE, WRITE).kind == MAPPED
    assert answer(r, WRITE, PROBE + PAGE).kind == MMIO
    assert not answer(r, READ, PROBE + 2 * PAGE).perm & WRITE


def test_contexts_in_turn():
    """Two contexts with the same addresses, on one vCPU: each faults into its own shadow."""
    r = known()
    other = r.new_tables()
    other.map_range(0, DATA + 16 * M, 2 * M)
    for page in range(100, 140):
        r.load(vmid=2, tables=other)
        assert answer(r, ipa=page * PAGE).cipa == DATA + 16 * M + page * PAGE
        r.load()
        assert answer(r, ipa=page * PAGE).cipa == DATA + page * PAGE


def test_a_page_that_is_another_contexts_now():
    """A shadow's leaf table went by a TLBI that lets L1's tables be remembered, and its page came to another context at
    the same address: what was remembered of it must not decide."""
    r = known()
    r.load(2, n=1)
    r.vcpu.tlbi("RIPAS2LE1IS", span(0, PAGE, num=7))
    assert r.leaves(0) == []
    assert r.fault(0, n=1).kind == MAPPED
    assert answer(r).kind == MAPPED
    assert r.leaves(0) == [(PROBE, DATA + PROBE, PAGE)]
    assert r.leaves(1) == [(0, DATA, PAGE)]


def test_another_kind_amid_a_batch():
    """Faults of a batch are begun together, as ones like the last; then one of them is of another kind, and what comes
    behind it must not become so too."""
    r = known()
    r.tables.map_range(2 * M, DATA + 2 * M, 2 * M, perm="r")
    assert r.fault(2 * M).kind == MAPPED
    got = r.vcpu.fault_many([2 * M + PAGE, PROBE, 2 * M + 2 * PAGE, PROBE + PAGE])
    assert (got["kind"] == MAPPED).all()
    assert [bool(perm & WRITE) for perm in got["perm"]] == [False, True, False, True]
    writable = {row["ipa"].item(): bool(row["perm"] & WRITE) for row in r.shadow()}
    assert [writable[ipa] for ipa in got["ipa"].tolist()] == [False, True, False, True]
    r.vm.check()


def test_an_eviction_amid_a_batch():
    """Faults of a batch are begun together; the first of them then evicts the leaf table of another."""
    def full(tables):
        r = Rig(contexts=1, max_table_bytes=400 * K)
        r.tables.next = RAM + 8 * M
        for n in range(tables):
            r.tables.map_range(n * 2 * M, DATA + n * PAGE, 3 * PAGE)
            assert r.fault(n * 2 * M).kind == r.fault(n * 2 * M + PAGE).kind == MAPPED
        return r

    n = next(n for n in range(1, 100) if full(n).vm.stats.evictions)
    r = full(n - 1)
    r.tables.map(n * 2 * M, DATA + n * PAGE)
    assert 8 < n < 32 and not r.vm.stats.evictions
    got = r.vcpu.fault_many([n * 2 * M, *(at * 2 * M + 2 * PAGE for at in range(n - 1))])
    assert (got["kind"] == MAPPED).all() and r.vm.stats.evictions
    r.vm.check()
    assert all(cipa == DATA + ipa // (2 * M) * PAGE + ipa % (2 * M) for ipa, cipa, _ in r.leaves())
    assert len(r.leaves()) > 1


def test_a_root_smaller_than_a_page():
    """The leaf table is the start table, with few entries, at an address within a page."""
    mem = s2shadow.GuestMemory()
    mem.add(RAM, 4 * M)
    base, ia_bits = RAM + 256, 35               # 32 GiB: 32 entries of level 1
    vtcr = (64 - ia_bits) | 1 << 6 | 5 << 16 | 1 << 31
    for entry in range(32):
        mem.write64(base + 8 * entry, RAM & -G | AF | 0xC0 | 15 << 2 | XN[36] << 53 | 1)
    vm = s2shadow.NestedVM(mem)
    vm.host.populate = s2shadow.Linear(HOST, max_block=PAGE)
    vm.vcpus[0].load(base | 1 << 48, vtcr, s2shadow.HCR_VM)
    for entry in (0, 5, 6, 31, 7, 30):
        for page in (0, 1, 2):
            f = vm.vcpus[0].fault(entry * G + RAM % G + page * PAGE)
            assert (f.kind, f.cipa) == (MAPPED, RAM + page * PAGE), entry
    vm.check()


@pytest.mark.parametrize("guest_level", [2, 3])
@pytest.mark.parametrize("block", [2 * M, PAGE])
def test_each_pair_of_sizes(guest_level, block):
    """Blocks and pages of either side; many faults in each of many tables."""
    r = Rig(host=False)
    r.vm.host.populate = s2shadow.Linear(HOST, max_block=block)
    for at in range(0, 32 * M, 2 * M):
        r.tables.map_range(at * 1024, DATA + at, 2 * M, level=guest_level)
    rng = np.random.default_rng(guest_level)
    size = min(block, r.tables.size(guest_level))
    seen = set()
    for at, page in zip(rng.integers(0, 16, 600) * 2 * M, rng.integers(0, 512, 600) * PAGE, strict=True):
        ipa, cipa = int(at) * 1024 + int(page), DATA + int(at) + int(page)
        f = r.fault(ipa)
        assert (f.kind, f.cipa, f.pa, f.size) == (HIT if ipa // size in seen else MAPPED, cipa, HOST + cipa, size)
        seen.add(ipa // size)
    r.vm.check()
