"""L1's TLB maintenance: exactly the leaves that the operation names fall."""

import pytest

import s2shadow
from rig import DATA, HOST, PAGE, RAM, K, M, Rig
from s2shadow import HCR_VM, HIT, MAPPED

ALL = ["ALLE1", "ALLE1IS", "ALLE1OS", "ALLE1NXS", "ALLE1ISNXS", "ALLE1OSNXS"]
VMALL = ["VMALLS12E1", "VMALLS12E1IS", "VMALLS12E1OS", "VMALLS12E1NXS", "VMALLS12E1ISNXS", "VMALLS12E1OSNXS"]
IPAS2 = [f"IPAS2{last}E1{share}{nxs}" for last in ("", "L") for share in ("", "IS", "OS") for nxs in ("", "NXS")]


@pytest.fixture
def r():
    """Three contexts with three pages each: VMID 1 and 2 with stage 2 on, VMID 1 with stage 2 off."""
    r = Rig(contexts=4)
    r.tables.map_range(0, DATA, 64 * PAGE)
    for options in ({"vmid": 2}, {"vmid": 1, "hcr": 0}, {"vmid": 1}):
        r.load(**options)
        for n in range(3):
            r.fault(n * PAGE + (0 if options.get("hcr", 1) else DATA))
    return r


def live(r):
    """Number of leaves by (VMID, stage 2 on)."""
    return {(c.vmid, c.enabled): c.entries for c in r.vm.contexts if c.entries}


FULL = {(1, True): 3, (2, True): 3, (1, False): 1}


def test_fixture(r):
    """What the others start from; with stage 2 off one block covers all three pages."""
    assert live(r) == FULL


@pytest.mark.parametrize("op", ALL)
def test_alle1(r, op):
    """Every leaf of every context."""
    result = r.vcpu.tlbi(op)
    assert live(r) == {}
    assert result.removed == 7
    r.vm.check()


@pytest.mark.parametrize("op", VMALL)
def test_vmalls12e1(r, op):
    """Every leaf of the VMID, stage 2 on and off."""
    result = r.vcpu.tlbi(op)
    assert live(r) == {(2, True): 3}
    assert result.removed == 4
    r.vm.check()


@pytest.mark.parametrize("op", IPAS2)
def test_ipas2e1(r, op):
    """One address: its leaf, in the contexts of the VMID with stage 2 on."""
    result = r.vcpu.tlbi(op, PAGE >> 12)
    assert live(r) == {(1, True): 2, (2, True): 3, (1, False): 1}
    assert [leaf[0] for leaf in r.leaves(r.vcpu.load(r.tables.vttbr(1), r.tables.vtcr).index)] == [0, 2 * PAGE]
    assert (result.removed, result.required) == (1, 1)
    assert r.fault(PAGE).kind == MAPPED and r.fault(0).kind == HIT
    r.vm.check()


@pytest.mark.parametrize("op", [(4, 8, 4, 1), 0xD50C_8421])
def test_spellings(r, op):
    """By fields, and by instruction word."""
    assert r.vcpu.tlbi(op, PAGE >> 12).removed == 1


def test_other_vmid(r):
    """L1 names a VMID that is not loaded: nothing is loaded or recycled for it."""
    before = [(c.index, c.vmid, c.refs) for c in r.vm.contexts]
    result = r.vcpu.tlbi("VMALLS12E1IS", vttbr=r.tables.vttbr(2), vtcr=r.tables.vtcr, hcr=HCR_VM)
    assert result.removed == 3
    assert live(r) == {(1, True): 3, (1, False): 1}
    assert [(c.index, c.vmid, c.refs) for c in r.vm.contexts] == before


def test_unknown_vmid(r):
    """A VMID that no context has."""
    assert r.vcpu.tlbi("VMALLS12E1IS", vttbr=99 << 48).removed == 0
    assert r.vcpu.tlbi("IPAS2E1IS", 1, vttbr=99 << 48).removed == 0
    assert live(r) == FULL


def test_vmid_masked_by_vs(r):
    """With VTCR.VS=0 the upper byte of the VMID is ignored here too."""
    assert r.vcpu.tlbi("VMALLS12E1IS", vttbr=0xAB01 << 48).removed == 4
    assert r.vcpu.tlbi("VMALLS12E1IS", vttbr=0x0102 << 48, vtcr=r.tables.vtcr | 1 << 19).removed == 0


def test_all_tables_of_the_vmid():
    """Contexts that share a VMID and differ in base, size or byte order all receive the operation."""
    r = Rig(contexts=8)
    second = r.new_tables()
    for tables in (r.tables, second):
        tables.map(0, DATA)
        r.load(1, tables)
        r.fault(0)
    r.load(1)
    assert r.vcpu.tlbi("IPAS2E1IS", 0).removed == 2


def test_junk_in_the_operand(r):
    """Reserved and upper address bits are ignored on a 48-bit machine; TTL is zero."""
    assert r.vcpu.tlbi("IPAS2E1IS", PAGE >> 12 | 0x7FFF << 48 | 0xF << 36 | 0xF << 40 | 1 << 63).removed == 1


def test_nothing_there(r):
    """An address without a leaf, and one beyond the input size."""
    for page in (40, 1 << 30, (1 << 36) - 1):
        assert r.vcpu.tlbi("IPAS2E1IS", page).removed == 0
    assert live(r) == FULL


@pytest.mark.parametrize(("granule", "level"), [(4 * K, 2), (16 * K, 3), (16 * K, 2), (64 * K, 3), (64 * K, 2)])
def test_extent_is_l1s_leaf(granule, level):
    """All fragments of the L1 leaf that the address lies in, and none of the leaf beside it."""
    r = Rig(granule=granule, host=False)
    for at in range(0, 4 * M, PAGE):
        r.vm.host.map(RAM + at, HOST + RAM + at, PAGE)
    span = r.tables.size(level)
    base = 4 * span
    cipa = RAM + 2 * M if span <= 2 * M else RAM  # aligned to every leaf size, with 2 MiB of host pages there
    for n in range(2):
        r.tables.map(base + n * span, cipa, level)
    first = [base + at for at in range(0, min(span, 2 * M), max(PAGE, min(span, 2 * M) // 128))]
    second = [ipa + span for ipa in first]
    for ipa in first + second:
        assert r.fault(ipa).kind == MAPPED
    named = base + span - PAGE
    assert r.vcpu.tlbi("IPAS2E1IS", named >> 12).removed == len(first)
    assert [leaf[0] for leaf in r.leaves()] == second
    r.vm.check()


def test_extent_after_split(r):
    """A 4K leaf of L1 in a place where L1 had a block before: its recorded level counts, not the table now."""
    r.tables.set(r.tables.slot(2 * M, 2), r.tables.leaf(DATA, 2))
    r.vm.unmap(DATA, DATA + PAGE)  # the host has pages here now
    r.fault(2 * M + PAGE)
    r.fault(2 * M + 5 * PAGE)
    r.tables.map_range(2 * M, DATA, 8 * PAGE)
    r.fault(2 * M + 6 * PAGE)
    assert r.vcpu.tlbi("IPAS2E1IS", (2 * M + 6 * PAGE) >> 12).removed == 3
    r.fault(2 * M + 5 * PAGE)
    r.fault(2 * M + 6 * PAGE)
    assert r.vcpu.tlbi("IPAS2E1IS", (2 * M + 6 * PAGE) >> 12).removed == 1


def test_remap_then_tlbi(r):
    """The usual sequence of L1: clear, invalidate, map anew. Only then does the new page show."""
    r.tables.map(PAGE, DATA + 9 * PAGE)
    assert r.fault(PAGE).cipa == DATA + PAGE
    r.vcpu.tlbi("IPAS2E1IS", PAGE >> 12)
    assert r.fault(PAGE).cipa == DATA + 9 * PAGE


def test_no_stale_table_memory(r):
    """A whole table replaced by another, with its TLBI: no fault is answered from the old one."""
    slot = r.tables.slot(0, 2)
    other = r.tables.new_table()
    for n in range(3):
        r.tables.set(other + 8 * n, r.tables.leaf(DATA + (20 + n) * PAGE, 3))
    r.tables.set(slot, other | 3)
    r.vcpu.tlbi("VMALLS12E1IS")
    assert [r.fault(n * PAGE).cipa for n in range(3)] == [DATA + (20 + n) * PAGE for n in range(3)]


def test_every_leaf_owes_maintenance(r):
    """What a TLBI of L1 removes is owed to the hardware."""
    r.vm.take_tlbis()
    vmid = r.vm.contexts[r.vcpu.load(r.tables.vttbr(1), r.tables.vtcr).index].host_vmid
    r.vcpu.tlbi("IPAS2E1IS", PAGE >> 12)
    rows = r.vm.take_tlbis()
    mine = [row for row in rows if row["host_vmid"] == vmid]
    assert any(row["op"] == 0 or (row["start"] <= PAGE and row["end"] >= 2 * PAGE) for row in mine)


@pytest.mark.parametrize("op", ["NONSENSE", "", (1, 2, 3, 4), 0xD503_201F])
def test_undefined(r, op):
    """What is no TLBI raises, and removes nothing."""
    with pytest.raises(ValueError):
        r.vcpu.tlbi(op)
    assert live(r) == FULL


def test_undefined_without_features():
    """Outer-shareable and nXS forms need their features."""
    r = Rig(features=s2shadow.Features(tlbios=False, xs=False))
    for op in ("ALLE1OS", "ALLE1NXS", "IPAS2E1OS"):
        with pytest.raises(s2shadow.UndefinedInstruction):
            r.vcpu.tlbi(op)
    r.vcpu.tlbi("ALLE1IS")
