"""tlbi="exact": each TLBI removes what the architecture asks for and nothing else, engine against model.

Sequences of table edits, faults, host changes and TLBIs (any operation, hints right and wrong, any VMID, base and
input size); then hand-made cases, batches, counters, what is owed to the hardware, and two threads at once.
"""

import os
import random
import threading

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

import randomops
import s2shadow
import tlbistep
from lockstep import GRANULES
from model.tlbi import HCR_E2H, HCR_TGE, OPERATIONS
from rig import DATA, HOST, PAGE, RAM, TLBI_TG, G, K, M, Rig, single, span
from s2shadow import HCR_VM, HIT, L1_FAULT, MAPPED, MISS, TLBI_OP_DTYPE, UndefinedInstruction
from test_engine_stateful import Lockstep
from tlbistep import TLBIS, TlbiPair

LONG = os.environ.get("S2SHADOW_LONG") == "1"
FEATURES = ({}, {"lpa2": True}, {"ttl": False})
VMALLS12, IPA, VA, ASID, VMALL, ALL, VAA = range(7)


# Against the model


class Tlbis(Lockstep):
    """The rules of Lockstep, and every TLBI aimed at what is there."""

    dialect = "exact"

    @initialize(
        granules=st.sampled_from(GRANULES),
        vcpus=st.integers(1, 2),
        populate=st.sampled_from([None, 4096, 2 << 20]),
        features=st.sampled_from(FEATURES),
    )
    def start(self, granules, vcpus, populate, features):
        self.pair = TlbiPair(granules, vcpus, self.dialect, populate=populate, features=features)
        for slot in range(tlbistep.SLOTS):
            for table in (0, 1):
                self.pair.l1_map(table, self.pair.ipa(slot), 3 - slot % 2, 3 * slot)

    vcpu = st.integers(0, 1)
    pick = st.integers(0, 200)
    inside = st.integers(0, 1023)
    who = st.sampled_from(tlbistep.WHO)
    hcr = st.sampled_from(tlbistep.HCRS)
    junk = st.integers(0, (1 << 24) - 1)

    @rule(n=vcpu, op=st.sampled_from(tlbistep.IPA_OPS), pick=pick, inside=inside, ttl=st.sampled_from(tlbistep.TTLS),
          who=who, table=vcpu, junk=junk, hcr=hcr)  # fmt: skip
    def tlbi_address(self, **how):
        self.pair.tlbi_address(**how)

    @rule(n=vcpu, op=st.sampled_from(tlbistep.RANGE_OPS), pick=pick, inside=inside,
          size=st.tuples(st.integers(0, 3), st.integers(0, 31)), tg=st.sampled_from(tlbistep.TGS),
          ttl=st.sampled_from(tlbistep.RANGE_TTLS), back=st.integers(0, 5), high=st.sampled_from(tlbistep.HIGH),
          who=who, table=vcpu, ds=st.booleans(), junk=junk, hcr=hcr)  # fmt: skip
    def tlbi_range(self, **how):
        self.pair.tlbi_range(**how)

    @rule(n=vcpu, op=st.sampled_from(sorted(OPERATIONS)), pick=pick, who=who, table=vcpu,
          xt=st.integers(0, (1 << 64) - 1), hcr=hcr)  # fmt: skip
    def tlbi_any(self, **how):
        """Any of the 126 operations, with any operand."""
        self.pair.tlbi_whole(**how)

    @rule(n=vcpu, vmid=st.sampled_from([1, tlbistep.WIDE_VMID]))
    def load_wide(self, n, vmid):
        self.pair.load_wide(n, vmid)


TestTlbis = Tlbis.TestCase
TestTlbis.settings = settings(max_examples=1000 if LONG else 50, stateful_step_count=50, deadline=None)


def run_seeded(dialect, seed, count, mix, **options):
    """A long random run; after every TLBI all shadows are compared. Returns what the TLBIs did, counted."""
    rng = random.Random(seed)
    pair = TlbiPair(vcpus=2, dialect=dialect, **options)
    randomops.prefill(rng, pair)

    def after(n, name):
        if name.startswith("tlbi"):
            pair.check_shadows()
        if n % 250 == 0:
            pair.check_owed()

    randomops.run(rng, pair, count, after, mix)
    pair.check()
    return pair.done


MIX = {**randomops.QUIET, **TLBIS, randomops.tlbi: 0, randomops.batch: 300}
COUNT = 100_000 if LONG else 1_500


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("granules", GRANULES, ids=str)
def test_seeded(granules, features):
    """Full shadows and many TLBIs, for each pair of granules of L1 on a 4K host."""
    done = run_seeded("exact", 11, COUNT, MIX, granules=granules, features=features, populate=2 * M)
    for kind in ("IPA", "RANGE"):
        assert done[kind, "removed"] == done[kind, "required"] > 20
    assert done["STAGE1", "operations"] > 0 == done["STAGE1", "removed"]


@pytest.mark.parametrize("host_granule", [16 * K, 64 * K])
def test_host_granules(host_granule):
    """The same on hosts with 16K and 64K pages."""
    done = run_seeded("exact", 12, COUNT, MIX, granules=(host_granule, 64 * K), host_granule=host_granule)
    assert min(done[kind, "removed"] for kind in ("IPA", "RANGE")) > 20


# By hand


def fragments(granule, level, host_page=PAGE):
    """A rig whose only L1 leaf is backed by host pages, with some of its fragments faulted in."""
    r = Rig(granule=granule, host=False, contexts=4)
    for at in range(0, 4 * M, host_page):
        r.vm.host.map(RAM + at, HOST + RAM + at, host_page)
    size = r.tables.size(level)
    base = 4 * max(size, M)
    r.tables.map(base, RAM + 2 * M if size <= 2 * M else RAM, level)
    for at in range(0, min(size, 64 * K), PAGE):
        assert r.fault(base + at).kind == MAPPED
    return r, base, size, len(r.leaves())


LEVELS = [(4 * K, 3), (4 * K, 2), (4 * K, 1), (16 * K, 3), (16 * K, 2), (64 * K, 3), (64 * K, 2)]


@pytest.mark.parametrize(("granule", "level"), LEVELS)
def test_single_hint(granule, level):
    """All fragments of L1's leaf for any address in it with the right hint or none, none of them for another hint."""
    usable = {(g, lev) for g in TLBI_TG for lev in (1, 2, 3) if lev > 1 or g == 4 * K}
    for ttl in range(16):
        r, base, size, count = fragments(granule, level)
        hint = ({1: 4 * K, 2: 16 * K, 3: 64 * K}.get(ttl >> 2), ttl & 3)
        named = hint not in usable or hint == (granule, level)
        for address in (base - PAGE, base + size):
            assert r.vcpu.tlbi("IPAS2E1IS", address >> 12 | ttl << 44).removed == 0
        got = r.vcpu.tlbi("IPAS2LE1IS", (base + size - PAGE) >> 12 | ttl << 44)
        assert got.removed == got.required == (count if named else 0)
        assert len(r.leaves()) == (0 if named else count)


@pytest.mark.parametrize(("granule", "level"), LEVELS)
def test_range_hint(granule, level):
    """Granule and level must both fit; a range that touches L1's leaf at all takes all its fragments."""
    for tg in (0, 1, 2, 3):
        for ttl in range(4):
            r, base, size, count = fragments(granule, level)
            page = 1 << 10 + 2 * (tg or 3)
            reserved = (tg, ttl) == (2, 1)
            named = tg == TLBI_TG[granule] and (ttl in (0, level) or reserved)
            operand = tg << 46 | ttl << 37 | ((base + size) // page - 1)
            got = r.vcpu.tlbi("RIPAS2E1IS", operand)
            assert got.removed == got.required == (count if named else 0)
            assert len(r.leaves()) == (0 if named else count)


def test_range_edges():
    """[base, base + pages) to the page: the first and last leaf in it go, those beside it stay."""
    r = Rig()
    r.tables.map_range(0, DATA, 128 * PAGE)
    for n in range(128):
        r.fault(n * PAGE)
    assert r.vcpu.tlbi("RIPAS2E1", span(10 * PAGE, 4 * K, num=7)).removed == 16
    assert [leaf[0] // PAGE for leaf in r.leaves()] == [*range(10), *range(26, 128)]


def test_512g_block():
    """With LPA2 and DS a leaf at level 0: TTL names it, no tag runs out of bits."""
    for ttl, count in ((0, 2), (0b0100, 2), (0b0101, 0), (0b1000, 2)):
        r = Rig(features=s2shadow.Features(lpa2=True), contexts=4)
        tables = r.new_tables(vtcr=1 << 32, start=0)
        r.load(1, tables)
        tables.map(512 * G, 0, 0, sh=0)
        for at in (DATA, DATA + 8 * M):
            assert r.fault(512 * G + at).kind == MAPPED
        assert r.shadow(r.load(1, tables).index)["guest_level"].tolist() == [0, 0]
        got = r.vcpu.tlbi("IPAS2E1IS", (1024 * G - PAGE) >> 12 | ttl << 44)
        assert got.removed == got.required == count


def test_registers_of_another_vmid():
    """VMIDs that are not loaded, bases that differ: every context of the VMID is hit, nothing is acquired."""
    r = Rig(contexts=8)
    second, third = r.new_tables(), r.new_tables(granule=64 * K)
    for tables in (r.tables, second, third):
        tables.map(0, DATA)
        for vmid in (1, 2):
            r.load(vmid, tables)
            assert r.fault(0).kind == MAPPED
    r.load(3)
    r.vcpu.put()
    before = [(c.index, c.vmid, c.vttbr, c.refs) for c in r.vm.contexts]
    got = r.vcpu.tlbi("IPAS2E1IS", 0, vttbr=2 << 48 | 0xABCD000, vtcr=r.tables.vtcr, hcr=0)
    assert (got.removed, got.contexts) == (3, 3)
    got = r.vcpu.tlbi("IPAS2E1IS", single(0, 64 * K, 3), vttbr=0xFF01 << 48, vtcr=second.vtcr, hcr=HCR_VM)
    assert (got.removed, got.contexts) == (1, 3)
    assert r.vcpu.tlbi("VMALLS12E1", vttbr=77 << 48, vtcr=second.vtcr, hcr=HCR_VM).contexts == 0
    assert [(c.index, c.vmid, c.vttbr, c.refs) for c in r.vm.contexts] == before


def test_stage1_removes_nothing():
    """No stage-1 operation takes a leaf, under any E2H and TGE."""
    r = Rig()
    r.tables.map(0, DATA)
    r.fault(0)
    for name in tlbistep.STAGE1_OPS:
        for hcr in (HCR_VM, HCR_VM | HCR_E2H | HCR_TGE):
            got = r.vcpu.tlbi(name, span(0, 4 * K, 3, 31), hcr=hcr)
            assert (got.removed, got.required) == (0, 0)
    assert r.fault(0).kind == HIT


# Batches and counters


def batch(*rows):
    return np.array([(*row, *(0,) * (7 - len(row))) for row in rows], dtype=TLBI_OP_DTYPE)


def random_batch(rng, r, count):
    rows = []
    for _ in range(count):
        op = rng.choice([OPERATIONS[n] for n in tlbistep.IPA_OPS + tlbistep.RANGE_OPS])
        at = rng.randrange(256) * PAGE
        xt = span(at, 4 * K, 0, rng.randrange(4)) if op.range else single(at)
        vttbr = r.tables.vttbr(rng.randrange(1, 4))
        rows.append((rng.randrange(2), rng.randrange(2), op.word | rng.randrange(32), xt, vttbr, r.tables.vtcr, HCR_VM))
    return batch(*rows)


def filled():
    r = Rig(vcpus=2, contexts=4)
    r.tables.map_range(0, DATA, 256 * PAGE)
    for vmid in (1, 2):
        r.load(vmid, n=vmid - 1)
        for n in range(256):
            r.fault(n * PAGE, n=vmid - 1)
    return r


def test_batch_is_a_loop():
    """tlbi_many does what single calls in the same order do: counts, shadows, counters."""
    one, many = filled(), filled()
    ops = random_batch(random.Random(4), one, 100)
    names = {op.word: op.name for op in OPERATIONS.values()}
    loop = []
    for row in ops:
        regs = {name: int(row[name]) for name in ("vttbr", "vtcr", "hcr")} if row["flags"] & 1 else {}
        name = names[int(row["insn"]) & ~0x1F]
        loop.append(one.vm.vcpus[row["vcpu"]].tlbi(name, int(row["xt"]), **regs).removed)
    got = many.vm.tlbi_many(ops)
    assert got.dtype == np.uint64 and got.tolist() == loop and sum(loop) > 50
    for index in (0, 1):
        assert (one.shadow(index) == many.shadow(index)).all()
    assert one.vm.stats.tlbis == many.vm.stats.tlbis
    assert one.vm.take_tlbis().tolist() == many.vm.take_tlbis().tolist()


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        ((0, 0, 0xD503_201F), UndefinedInstruction, r"ops\[1\]"),
        ((0, 0, OPERATIONS["VAE1"].word | 6 << 16), UndefinedInstruction, r"ops\[1\].*EL3"),
        ((2, 0, OPERATIONS["ALLE1"].word), ValueError, r"ops\[1\].*2"),
    ],
)
def test_batch_refused(bad, error, text):
    """A row that cannot be is named, and no row is applied."""
    r = filled()
    before = r.vm.stats
    with pytest.raises(error, match=text):
        r.vm.tlbi_many(batch((0, 0, OPERATIONS["ALLE1"].word), bad))
    assert r.vm.stats == before and before.live == 512


def test_batch_arguments():
    """An empty batch is nothing; another dtype is no batch."""
    r = filled()
    assert r.vm.tlbi_many(batch()[:0]).tolist() == []
    for wrong in (np.zeros(2), [1], batch((0,)).reshape(1, 1)):
        with pytest.raises(TypeError, match="ops"):
            r.vm.tlbi_many(wrong)


def test_counters():
    """Operations, contexts visited, leaves removed and required, by class."""
    r = filled()
    regs = {"vttbr": r.tables.vttbr(2), "vtcr": r.tables.vtcr, "hcr": HCR_VM}
    for op, xt in (("IPAS2E1", 1), ("IPAS2E1IS", 1), ("RIPAS2E1", span(0, 4 * K, num=1)), ("VAE1", 0), ("ALLE2", 0)):
        r.vcpu.tlbi(op, xt, **regs)
    r.vcpu.tlbi("VMALLS12E1", **regs)
    r.vcpu.tlbi("ALLE1")
    assert {name: tuple(row) for name, row in r.vm.stats.tlbis.items() if name != "STAGE1"} == {
        "IPA": (2, 2, 1, 1), "RANGE": (1, 1, 3, 3), "VMALLS12": (1, 1, 252, 252), "ALL": (1, 2, 256, 256),
    }  # fmt: skip
    assert r.vm.stats.tlbis["STAGE1"].operations == 2


# What the hardware is owed


def owed(r):
    return [tuple(row[n].item() for n in ("op", "host_vmid", "start", "end")) for row in r.vm.take_tlbis()]


def host_vmid(r, vmid, enabled=True):
    return next(c.host_vmid for c in r.vm.contexts if (c.vmid, c.enabled) == (vmid, enabled))


def test_owed_by_ipa():
    """Each removed leaf by IPA, neighbours in one row, and then all of stage 1 of each context that lost one."""
    r = filled()
    third = r.new_tables()
    third.map(0, DATA)
    r.load(1, third, n=1)
    r.fault(0, n=1)
    r.vm.take_tlbis()
    r.vcpu.tlbi("RIPAS2E1IS", span(0, 4 * K, num=3))
    rows = r.vm.take_tlbis()
    ours = host_vmid(r, 1)
    (other,) = {c.host_vmid for c in r.vm.contexts if c.vmid == 1} - {ours}
    ends = {ours: 8 * PAGE, other: PAGE}
    leaves = rows[(rows["op"] == IPA) & (rows["last_level"] == 1)]  # the others are for tables that became empty
    assert sorted(leaves[["host_vmid", "start", "end"]].tolist()) == sorted((v, 0, end) for v, end in ends.items())
    assert sorted(rows[rows["op"] == VMALL]["host_vmid"].tolist()) == sorted(ends)
    assert rows["op"].tolist()[-2:] == [VMALL, VMALL]
    r.vcpu.tlbi("IPAS2E1IS", single(100 * PAGE))
    assert owed(r) == [(IPA, host_vmid(r, 1), 100 * PAGE, 101 * PAGE), (VMALL, host_vmid(r, 1), 0, 0)]
    r.vcpu.tlbi("IPAS2E1IS", single(100 * PAGE))
    assert owed(r) == []


def test_owed_by_vmid():
    """VMALLS12E1 and ALLE1 owe no less than the leaves that they removed, under their own context."""
    r = filled()
    r.vm.take_tlbis()
    r.vcpu.tlbi("VMALLS12E1IS", vttbr=r.tables.vttbr(2))
    assert {row[1] for row in owed(r)} == {host_vmid(r, 2)}
    r.vcpu.tlbi("ALLE1IS")
    rows = owed(r)
    assert any(row[0] == ALL or row[:2] == (VMALLS12, host_vmid(r, 1)) for row in rows)


STAGE1_ROWS = [  # operation, operand -> op, start, end, ASID or None
    ("VMALLE1IS", 0, VMALL, 0, 0, None),
    ("VAE1IS", 7 << 48 | 5, VA, 5 * PAGE, 6 * PAGE, 7),
    ("VALE1", 7 << 48 | 5, VA, 5 * PAGE, 6 * PAGE, 7),
    ("VAAE1OS", 7 << 48 | 5, VAA, 5 * PAGE, 6 * PAGE, None),
    ("ASIDE1IS", 9 << 48, ASID, 0, 0, 9),
    ("RVAE1IS", 7 << 48 | span(16 * PAGE, 4 * K, num=1), VA, 16 * PAGE, 20 * PAGE, 7),
    ("RVAALE1ISNXS", span(16 * PAGE, 4 * K, num=1), VAA, 16 * PAGE, 20 * PAGE, None),
]


def two_contexts_of_vmid_1(**options):
    """VMID 1 with stage 2 on and off, VMID 2; nothing owed."""
    r = Rig(contexts=4, **options)
    for vmid, hcr in ((2, HCR_VM), (1, 0), (1, HCR_VM)):
        r.load(vmid, hcr=hcr)
    r.vm.take_tlbis()
    return r


@pytest.mark.parametrize(("op", "xt", "row", "start", "end", "asid"), STAGE1_ROWS)
def test_owed_stage1(op, xt, row, start, end, asid):
    """An operation on EL1's stage 1 goes to every context of the VMID, with its address and ASID."""
    r = two_contexts_of_vmid_1()
    got = r.vcpu.tlbi(op, xt)
    rows = r.vm.take_tlbis()
    assert got.contexts == 2
    assert sorted(rows["host_vmid"].tolist()) == sorted([host_vmid(r, 1), host_vmid(r, 1, False)])
    assert set(rows[["op", "start", "end"]].tolist()) == {(row, start, end)}
    assert asid is None or set(rows["asid"].tolist()) == {asid}
    if row in (VA, VAA):
        assert set(rows["last_level"].tolist()) == {int(OPERATIONS[op].last_level)}


@pytest.mark.parametrize(("granule", "row"), [(4 * K, VMALL), (16 * K, VMALL), (64 * K, VA)])
def test_owed_stage1_range_in_unknown_units(granule, row):
    """With FEAT_LPA2 the base of a range is in units of 64K where L2's TCR_EL1.DS is 1, which nobody says: all goes."""
    r = two_contexts_of_vmid_1(features=s2shadow.Features(lpa2=True))
    r.vcpu.tlbi("RVAE1IS", 7 << 48 | span(16 * 64 * K, granule))
    rows = r.vm.take_tlbis()
    assert sorted(rows["host_vmid"].tolist()) == sorted([host_vmid(r, 1), host_vmid(r, 1, False)])
    assert set(rows["op"].tolist()) == {row}


@pytest.mark.parametrize("op", tlbistep.STAGE1_OPS)
def test_owed_el2(op):
    """Operations on EL2's stage 1, and EL1's with {E2H,TGE}={1,1}, go to the virtual EL2 alone: host VMID 1."""
    r = two_contexts_of_vmid_1()
    xt = span(16 * PAGE, 4 * K)
    for hcr in (HCR_VM, HCR_VM | HCR_E2H, HCR_VM | HCR_E2H | HCR_TGE, HCR_VM | HCR_TGE):
        r.vcpu.tlbi(op, xt, hcr=hcr)
        vmids = {row[1] for row in owed(r)}
        to_el2 = OPERATIONS[op].regime == "EL2_S1" or hcr & HCR_E2H and hcr & HCR_TGE
        assert vmids == ({1} if to_el2 else {host_vmid(r, 1), host_vmid(r, 1, False)})


@pytest.mark.parametrize("op", ["VAE2IS", "VALE2", "RVAE2", "RVALE2OS"])
def test_owed_el2_asid(op):
    """EL2 without E2H has no ASID: the field is reserved, and junk in it must not narrow what is owed."""
    r = two_contexts_of_vmid_1()
    xt = 7 << 48 | (span(16 * PAGE, 4 * K) if op.startswith("R") else 16)
    r.vcpu.tlbi(op, xt, hcr=HCR_VM | HCR_E2H)
    r.vcpu.tlbi(op, xt, hcr=HCR_VM)
    with_e2h, without = r.vm.take_tlbis()
    assert (with_e2h["op"], with_e2h["asid"]) == (VA, 7)
    assert without["op"] == VAA or without["asid"] == 0


def test_owed_stage1_nothing():
    """A range with TG=00, or a VMID that nobody has, owes nothing."""
    r = two_contexts_of_vmid_1()
    r.vcpu.tlbi("RVAE1IS", 5)
    r.vcpu.tlbi("VMALLE1IS", vttbr=77 << 48)
    assert owed(r) == []


def test_owed_order():
    """seq never falls; rows of one operation share it; later operations have a later one."""
    r = filled()
    r.vm.take_tlbis()
    for n in range(20):
        r.vcpu.tlbi("IPAS2E1IS", single((20 - n) * 2 * PAGE))
        r.vcpu.tlbi("VAE1IS", n)
    rows = r.vm.take_tlbis()
    assert (np.diff(rows["seq"].astype(np.int64)) >= 0).all()
    assert len(set(rows["seq"].tolist())) == 40
    assert rows[rows["op"] == IPA]["start"].tolist() == [(20 - n) * 2 * PAGE for n in range(20)]


def test_owed_collapses():
    """When nobody drains, the queue ends as whole invalidations of each context that it named, and no longer."""
    r = filled()
    r.vm.take_tlbis()
    for n in range(20_000):
        r.vcpu.tlbi("VAE1IS", n, vttbr=r.tables.vttbr(1 + n % 2))
    rows = owed(r)
    assert {(VMALLS12, host_vmid(r, vmid)) for vmid in (1, 2)} <= {row[:2] for row in rows}
    assert len(rows) < 10_000
    r.vcpu.tlbi("VAE1IS", 3)
    assert len(owed(r)) == 1


# Threads


@pytest.mark.parametrize("op", ["IPAS2E1IS", "RIPAS2E1IS", "VMALLS12E1IS"])
def test_race(op):
    """One faults, one clears L1's descriptor and invalidates: no leaf that the TLBI named is there afterwards."""
    r = Rig(vcpus=2)
    r.load(1, n=1)
    pages, stop, failures = 16, threading.Event(), []
    ipas = np.random.default_rng(1).integers(0, pages, 500, dtype=np.uint64) * PAGE

    def faults():
        try:
            while not stop.is_set():
                rows = r.vm.vcpus[1].fault_many(ipas)
                assert set(rows["kind"].tolist()) <= {HIT, MAPPED, L1_FAULT, int(s2shadow.RETRY)}
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=faults)
    thread.start()
    removed = 0
    try:
        for n in range(2000):
            ipa = n % pages * PAGE
            slot = r.tables.map(ipa, DATA + n % 1000 * PAGE)
            if n % 4 == 0:
                r.fault(ipa)
            r.tables.set(slot, 0)
            xt = {"IPAS2E1IS": single(ipa), "RIPAS2E1IS": span(ipa, 4 * K)}.get(op, 0)
            removed += r.vcpu.tlbi(op, xt).removed
            assert r.vcpu.translate(ipa).kind == MISS
    finally:
        stop.set()
        thread.join()
    assert not failures
    assert removed >= 500
    r.vm.check()


