"""Which loads share a context, which context is recycled, and what becomes of its leaves."""

import pytest

import s2shadow
from rig import DATA, HOST, PAGE, ROM, K, M, Rig
from s2shadow import HCR_CD, HCR_DC, HCR_FWB, HCR_VM, HIT, L1_FAULT, MAPPED, READ

VS = 1 << 19


@pytest.fixture
def r():
    r = Rig(vcpus=2, contexts=4)
    r.tables.map_range(0, DATA, 16 * PAGE)
    return r


def index(r, vttbr=None, vtcr=None, **options):
    vttbr = r.tables.vttbr(1) if vttbr is None else vttbr
    return r.vcpu.load(vttbr, r.tables.vtcr if vtcr is None else vtcr, **options).index


# the key


def test_same_registers_same_context(r):
    """Loading again finds the old context and what it holds."""
    assert index(r) == 0
    r.fault(0)
    r.vcpu.put()
    assert index(r) == 0
    assert r.fault(0).kind == HIT


@pytest.mark.parametrize(
    ("vttbr", "vtcr"),
    [(1, 0), (0, 0x3 << 8), (0, 0x3 << 10), (0, 0x3 << 12), (0, 1 << 31), (0, 0xF << 25), (0x7FE, 0), (0xAB << 56, 0)],
)
def test_irrelevant_bits(r, vttbr, vtcr):
    """CnP, walk cacheability and shareability, ignored base bits and ignored VMID bits are not part of the key."""
    first = index(r)
    assert index(r, r.tables.vttbr(1) ^ vttbr, r.tables.vtcr ^ vtcr) == first


def test_dirty_state_bit_without_the_feature(r):
    """HD means nothing to a machine whose FEAT_HAFDBS stops at the access flag."""
    assert index(r) == index(r, vtcr=r.tables.vtcr | 1 << 22)


@pytest.mark.parametrize(
    "change",
    [
        {"vttbr": 2 << 48},
        {"vttbr": 64 * K},
        {"vtcr": 1},
        {"vtcr": 1 << 6},
        {"vtcr": 1 << 14},
        {"vtcr": 1 << 16},
        {"vtcr": 1 << 21},
        {"hcr": HCR_VM | HCR_FWB},
        {"hcr": HCR_VM | HCR_CD},
        {"hcr": 0},
        {"big_endian": True},
    ],
    ids=str,
)
def test_relevant_bits(r, change):
    """VMID, base, size, start level, granule, output size, HA, FWB, CD, stage 2 on or off, byte order."""
    first = index(r)
    options = {k: v for k, v in change.items() if k not in ("vttbr", "vtcr")}
    other = index(r, r.tables.vttbr(1) ^ change.get("vttbr", 0), r.tables.vtcr ^ change.get("vtcr", 0), **options)
    assert other != first
    assert index(r) == first


def test_shareability_of_leaves_without_any():
    """With DS the leaves have no SH: VTCR.SH0 is theirs, and makes another context."""
    r = Rig(features=s2shadow.Features(pa_bits=52, lpa2=True), wide=True, contexts=4)
    first = index(r)
    for sh0 in (1 << 12, 1 << 13):
        assert index(r, vtcr=r.tables.vtcr ^ sh0) != first
    assert index(r) == first


def test_size_of_a_stage_2_that_is_off():
    """T0SZ says nothing then: L2's addresses are the machine's."""
    r = Rig()
    r.vm.host.map(ROM, HOST + ROM, 2 * M)
    context = index(r, vtcr=64 - 25 | 1 << 31, hcr=0)
    assert r.fault(ROM).kind == MAPPED and r.fault(ROM).kind == HIT
    assert r.leaves(context) == [(ROM, ROM, 2 * M)]
    r.vm.check()


@pytest.mark.parametrize("wide", [False, True])
def test_vmid_width(wide):
    """VS and the machine together say whether the upper byte of the VMID counts."""
    r = Rig(features=s2shadow.Features(vmid_bits=16 if wide else 8), contexts=4)
    r.tables.vtcr |= VS
    first = index(r, r.tables.vttbr(0x0105))
    assert (index(r, r.tables.vttbr(0x0205)) == first) == (not wide)
    r.tables.vtcr &= ~VS
    assert index(r, r.tables.vttbr(0x0105)) == index(r, r.tables.vttbr(0x0305))


def test_dc_is_vm(r):
    """DC=1 with VM=0 is stage 2 on, the very context of VM=1."""
    assert index(r, hcr=HCR_DC) == index(r, hcr=HCR_VM)


def test_stage2_off_key(r):
    """With stage 2 off the VMID alone counts."""
    first = index(r, hcr=0)
    assert index(r, r.tables.vttbr(1) ^ 0x10000, 0, hcr=0) == first
    assert index(r, r.tables.vttbr(2), hcr=0) != first
    assert index(r) != first


# the pool


def test_contexts_shown(r):
    """vm.contexts says who is who."""
    r.fault(0)
    r.fault(PAGE)
    ctx = r.vm.contexts[0]
    assert (ctx.index, ctx.vmid, ctx.vtcr, ctx.enabled, ctx.entries, ctx.refs) == (0, 1, r.tables.vtcr, True, 2, 1)
    assert ctx.vttbr & ~(1 | 1 << 63) == r.tables.vttbr(1)
    assert ctx.table_bytes >= 3 * PAGE


def test_load_returns_the_context(r):
    """load says what it picked."""
    ctx = r.load(7)
    assert (ctx.vmid, ctx.enabled, ctx.entries) == (7, True, 0)


def test_references(r):
    """A context is referenced once per vCPU that has it loaded, whatever the order of load and put."""

    def refs():
        return [c.refs for c in r.vm.contexts if c.index == 0]

    assert refs() == [1]
    r.load(1, n=1)
    assert refs() == [2]
    r.load(1, n=1)
    assert refs() == [2]
    r.load(2)
    assert refs() == [1]
    r.vm.vcpus[1].put()
    assert refs() == [0]


def test_put_twice(r):
    """A second put is harmless or refused, never a wrong count."""
    r.vcpu.put()
    try:
        r.vcpu.put()
    except (RuntimeError, ValueError):
        pass
    assert [c.refs for c in r.vm.contexts if c.index == 0] == [0]
    r.vm.check()


def test_unused_first(r):
    """Slots that were never used come first."""
    assert [r.load(vmid).index for vmid in (1, 2, 3, 4)] == [0, 1, 2, 3]


def test_least_recently_used_goes(r):
    """A full pool: the context that was not used for longest goes, with everything it held."""
    for vmid in (1, 2, 3, 4):
        r.load(vmid)
        r.fault(vmid * PAGE)
    r.load(1)
    assert r.load(5).index == 1
    assert len(r.shadow(1)) == 0
    assert [len(r.shadow(n)) for n in (0, 2, 3)] == [1, 1, 1]
    assert r.vm.stats.contexts_recycled == 1
    assert len(r.vm.reverse(DATA + 2 * PAGE)) == 0
    assert r.load(2).index == 2
    assert r.fault(2 * PAGE).kind == MAPPED
    r.vm.check()


def test_referenced_is_not_recycled(r):
    """A loaded context is never recycled, however long ago it was loaded."""
    r.load(9, n=1)
    r.fault(0, n=1)
    for vmid in range(20, 30):
        r.load(vmid)
    assert r.fault(0, n=1).kind == HIT
    assert [c.vmid for c in r.vm.contexts if c.refs] == [29, 9] or {c.vmid for c in r.vm.contexts if c.refs} == {29, 9}


def test_recycled_context_is_empty_and_flushed(r):
    """Its new owner finds nothing, and the hardware is told before: VMALLS12 for its host VMID."""
    for vmid in (1, 2, 3, 4):
        r.load(vmid)
        r.fault(0)
    r.vm.take_tlbis()
    ctx = r.load(5)
    rows = r.vm.take_tlbis()
    assert ctx.entries == 0
    assert any(row["op"] == 0 and row["host_vmid"] == ctx.host_vmid for row in rows)
    r.tables.map(0, DATA + PAGE)
    assert r.fault(0).pa == HOST + DATA + PAGE


def test_host_vmids_differ(r):
    """Contexts are kept apart in hardware: each has a host VMID of its own."""
    for vmid in (1, 2, 3, 4):
        r.load(vmid)
    used = [c.host_vmid for c in r.vm.contexts]
    assert len(set(used)) == 4


def test_two_vcpus_share(r):
    """Two vCPUs with equal registers share one context and its entries."""
    r.load(1, n=1)
    assert r.fault(0, n=0).kind == MAPPED
    assert r.fault(0, n=1).kind == HIT


def test_too_few_contexts():
    """Fewer contexts than vCPUs could not serve them."""
    mem = s2shadow.GuestMemory()
    with pytest.raises(ValueError, match="contexts"):
        s2shadow.NestedVM(mem, vcpus=4, contexts=3)
    assert len(s2shadow.NestedVM(mem, vcpus=4, contexts=4).vcpus) == 4


def test_default_pool():
    """Two contexts per vCPU by default."""
    r = Rig(vcpus=2)
    assert [r.load(vmid).index for vmid in range(1, 6)] == [0, 1, 2, 3, 0]


def test_no_context_loaded(r):
    """A fault without a context is an error, not a guess."""
    r.vcpu.put()
    with pytest.raises((RuntimeError, ValueError)):
        r.fault(0)
    with pytest.raises((RuntimeError, ValueError)):
        r.vcpu.fault_many([0], READ)


@pytest.mark.parametrize("vtcr", [0, (1 << 64) - 1, 3 << 6, 0x8000_0000])
@pytest.mark.parametrize("vttbr", [0, (1 << 64) - 1])
def test_any_registers(r, vttbr, vtcr):
    """load never raises for what L1 wrote."""
    for hcr in (0, HCR_VM, (1 << 64) - 1):
        r.vcpu.load(vttbr, vtcr, hcr=hcr, big_endian=True, s2pir=vttbr)
        f = r.fault(0)
        assert f.kind == L1_FAULT or hcr == 0
    r.vm.check()


def test_what_was_combined_last_is_of_its_context():
    """The same leaf under the same host page, with L1's caches off, is another leaf of the shadow."""
    seen = []
    for registers in ((HCR_VM | HCR_CD,), (HCR_VM, HCR_VM | HCR_CD), (HCR_VM | HCR_CD, HCR_VM)):
        r = Rig(contexts=4, features=s2shadow.Features(fwb=False))
        r.tables.map_range(0, DATA, 16 * PAGE)
        for hcr in registers:
            index = r.load(hcr=hcr).index
            assert r.fault(PAGE).kind == MAPPED
        seen.append(r.vm.shadow(index)["memattr"].tolist())
    assert seen == [[5], [5], [15]]
