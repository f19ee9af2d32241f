"""Where Linux 7.2 seems to depart from the architecture, this engine does what the architecture says.

W1 to W11 are points of arch/arm64/kvm of 7.2.13, found by reading and not confirmed upstream. The line above each group
says what Linux seems to do, its tests what must be. W10 is about AT instructions, which this package does not emulate.
"""

import threading

import pytest

from rig import DATA, DEVICE, HOST, NOWHERE, PAGE, G, K, M, Rig, single, span
from s2shadow import (
    EXEC,
    HCR_DC,
    HCR_VM,
    HIT,
    HOST_FAULT,
    L1_FAULT,
    MAPPED,
    MISS,
    MMIO,
    PTW,
    READ,
    WRITE,
    Features,
    HostMapping,
    UndefinedInstruction,
    decode_tlbi,
)

IPA, VA, VMALL = 1, 2, 4  # HW_TLBI_DTYPE.op
TRANSLATION_0, SIZE_0 = 0x04, 0x00
VS = 1 << 19


# W1: dirty logging write-protects the shadows and flushes the TLB of the canonical VMID only


def test_w1_dirty_logging_owes_shadow_tlbis():
    """What logging takes W from is owed under the host VMID of its own context, with a seq up to the ticket."""
    r = Rig()
    r.tables.map(0, DATA)
    assert r.fault(0, WRITE).kind == MAPPED
    r.vm.take_tlbis()
    ticket = r.vm.log_dirty(DATA, DATA + PAGE).ticket
    rows = r.vm.take_tlbis()
    (context,) = r.vm.contexts
    ours = rows[rows["host_vmid"] == context.host_vmid]
    assert (IPA, 0, PAGE) in ours[["op", "start", "end"]].tolist()
    assert (ours["seq"] <= ticket).all()
    assert r.vcpu.translate(0, WRITE).kind == MISS


# W2: no check of nIPA < 2^(64-T0SZ); the index is masked, so that addresses alias


@pytest.mark.parametrize("granule", [4 * K, 16 * K, 64 * K])
@pytest.mark.parametrize("beyond", [1, 2, 3])
def test_w2_input_size_is_checked(granule, beyond):
    """An address beyond the input size is L1's translation fault, level 0, never the page of its low bits."""
    r = Rig(granule=granule)
    r.tables.map(granule, DATA & -granule)
    alias = granule + (beyond << r.tables.ia_bits)
    for access in (READ, WRITE, EXEC, READ | PTW):
        f = r.fault(alias, access)
        assert (f.kind, f.fsc, f.level) == (L1_FAULT, TRANSLATION_0, 0)
    assert r.leaves() == []


@pytest.mark.parametrize("granule", [4 * K, 16 * K, 64 * K])
def test_w2_no_alias_survives(granule):
    """So after L1's TLBI by the low address nothing of the page is left, under whatever address."""
    r = Rig(granule=granule)
    slot = r.tables.map(granule, DATA & -granule)
    alias = granule + (1 << r.tables.ia_bits)
    assert [r.fault(ipa).kind for ipa in (granule, alias)] == [MAPPED, L1_FAULT]
    r.tables.set(slot, 0)
    r.vcpu.tlbi("IPAS2E1IS", single(granule))
    assert [r.fault(ipa).kind for ipa in (granule, alias)] == [L1_FAULT, L1_FAULT]
    assert r.leaves() == []


# W3: a configuration that KVM rejects leaves FSC 0, warns, and returns an error from KVM_RUN


@pytest.mark.parametrize("t0sz, sl0", [(8, 1), (63, 1), (24, 3), (24, 0), (40, 1), (0, 2)])
def test_w3_illegal_configuration_is_l1s_fault(t0sz, sl0):
    """T0SZ out of bounds, or one that does not go with SL0: L1 gets a translation fault, level 0, at every address."""
    r = Rig()
    r.vcpu.load(r.tables.vttbr(), t0sz | sl0 << 6 | 5 << 16)
    for ipa in (0, PAGE, G, 1 << 47):
        f = r.fault(ipa)
        assert (f.kind, f.fsc, f.level) == (L1_FAULT, TRANSLATION_0, 0)


@pytest.mark.parametrize("where", [DEVICE, NOWHERE])
def test_w3_unreadable_table_is_l1s_fault(where):
    """A table in a device or nowhere: L1 gets an external abort on the walk, level of the table."""
    r = Rig()
    r.vcpu.load(where | 1 << 48, r.tables.vtcr)
    f = r.fault(0)
    assert (f.kind, f.fsc, f.level) == (L1_FAULT, 0x14 + 1, 1)


# W4: HCR_EL2.DC does not count as "stage 2 on" in the lookup of the context


def test_w4_dc_turns_stage2_on():
    """With DC=1 and VM=0 L1's table is walked, in the context of stage 2 on and not in that of stage 2 off."""
    r = Rig(contexts=4)
    r.tables.map(0, DATA)
    off, dc, on = (r.load(hcr=hcr).index for hcr in (0, HCR_DC, HCR_VM))
    assert dc == on != off
    r.load(hcr=HCR_DC)
    assert r.fault(0).cipa == DATA
    f = r.fault(PAGE)
    assert (f.kind, f.fsc, f.level) == (L1_FAULT, 0x07, 3)
    r.load(hcr=0)
    assert r.fault(DATA).cipa == DATA and r.fault(0).kind == MMIO


def test_w4_tlbi_under_dc():
    """A TLBI by IPA that L1 issues with DC=1 and VM=0 reaches those entries."""
    r = Rig()
    r.tables.map(0, DATA)
    r.load(hcr=HCR_DC)
    r.fault(0)
    assert r.vcpu.tlbi("IPAS2E1IS", single(0)).removed == 1


# W5: VTCR_EL2.VS=0 is not applied to the VMID of VTTBR_EL2


def vs_rig(vs):
    r = Rig(contexts=4, vtcr=VS if vs else 0)
    r.tables.map_range(0, DATA, 4 * PAGE)
    return r


def test_w5_upper_vmid_byte_is_ignored():
    """With VS=0 the VMID is 8 bits wide: junk above finds the same context, with stage 2 on and off."""
    r = vs_rig(0)
    assert len({r.load(vmid).index for vmid in (0x07, 0x107, 0xFF07)}) == 1
    assert r.load(0xFF07).vmid == 7
    assert r.load(0x08).index != r.load(0x07).index
    assert len({r.load(vmid, hcr=0).index for vmid in (0x07, 0x107)}) == 1


@pytest.mark.parametrize("op, xt", [("IPAS2E1IS", single(0)), ("RIPAS2E1IS", span(0, 4 * K)), ("VMALLS12E1IS", 0)])
@pytest.mark.parametrize("vs", [0, 1])
def test_w5_tlbi_of_the_same_8_bit_vmid(op, xt, vs):
    """A TLBI under such junk reaches the entries of the VMID; with VS=1 it is another VMID's."""
    r = vs_rig(vs)
    r.load(7)
    r.fault(0)
    removed = r.vcpu.tlbi(op, xt, vttbr=r.tables.vttbr(0x107)).removed
    assert removed == (0 if vs else 1)


def test_w5_owed_under_the_right_context():
    """TLBIs of stage 1 go to the context that runs the VMID, whatever its upper byte."""
    r = vs_rig(0)
    context = r.load(7)
    r.vm.take_tlbis()
    r.vcpu.tlbi("VMALLE1IS", vttbr=r.tables.vttbr(0xA507))
    assert r.vm.take_tlbis()[["op", "host_vmid"]].tolist() == [(VMALL, context.host_vmid)]


# W6: an IPA TLBI between another vCPU's walk of L1's table and its install does not stop the install


TLBIS = {
    "IPAS2E1IS": single(5 * PAGE),
    "IPAS2LE1": single(5 * PAGE, 4 * K, 3),
    "RIPAS2E1IS": span(4 * PAGE, 4 * K),
    "VMALLS12E1IS": 0,
    "ALLE1IS": 0,
}


def directly(job):
    job()


def in_a_thread(job):
    thread = threading.Thread(target=job)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "the TLBI waits for the fault"


class Race:
    """vCPU 0 faults; when it has walked L1's table and asks the host for the page, vCPU 1 edits and invalidates.

    The host has no page until it is asked: between walk and install there is `populate`, without a lock. That makes the
    race happen each time; test_threads.py leaves it to chance.
    """

    def __init__(self, edit, op, run=directly):
        self.r = Rig(host=False, vcpus=2)
        self.slot = self.r.tables.map(5 * PAGE, DATA + 5 * PAGE)
        self.r.load(n=1)
        self.edit, self.op, self.run, self.asked = edit, op, run, []
        self.r.vm.host.populate = self.populate

    def populate(self, cipa, access):
        self.asked.append(cipa)
        if len(self.asked) == 1:
            self.run(self.interfere)
        return HostMapping(HOST + cipa, PAGE)

    def interfere(self):
        self.edit(self.r.tables, self.slot)
        self.r.vm.vcpus[1].tlbi(self.op, TLBIS[self.op])


@pytest.mark.parametrize("run", [directly, in_a_thread])
@pytest.mark.parametrize("op", TLBIS)
def test_w6_another_page(op, run):
    """The fault answers with the page that L1 mapped before its TLBI completed, and no leaf leads to the old one."""
    race = Race(lambda tables, slot: tables.set(slot, tables.leaf(DATA + 9 * PAGE, 3)), op, run)
    f = race.r.fault(5 * PAGE)
    assert (f.kind, f.cipa, f.pa) == (MAPPED, DATA + 9 * PAGE, HOST + DATA + 9 * PAGE)
    assert race.asked == [DATA + 5 * PAGE, DATA + 9 * PAGE]
    assert race.r.leaves() == [(5 * PAGE, DATA + 9 * PAGE, PAGE)]
    assert race.r.vm.reverse(DATA + 5 * PAGE).size == 0
    race.r.vm.check()


@pytest.mark.parametrize("op", TLBIS)
def test_w6_no_page(op):
    """L1 took the page away: the fault is its own, and nothing is installed."""
    race = Race(lambda tables, slot: tables.set(slot, 0), op)
    f = race.r.fault(5 * PAGE)
    assert (f.kind, f.fsc, f.level) == (L1_FAULT, 0x07, 3)
    assert race.r.leaves() == []


@pytest.mark.parametrize("op", TLBIS)
def test_w6_fewer_permissions(op):
    """L1 took W away while a write was on its way: permission fault, and no leaf that allows it."""
    race = Race(lambda tables, slot: tables.set(slot, tables.leaf(DATA + 5 * PAGE, 3, perm="r")), op)
    f = race.r.fault(5 * PAGE, WRITE)
    assert (f.kind, f.fsc, f.level) == (L1_FAULT, 0x0F, 3)
    assert race.r.vcpu.translate(5 * PAGE, WRITE).kind == MISS


@pytest.mark.parametrize("op", TLBIS)
def test_w6_in_a_batch(op):
    """The same in the middle of a batch: the pages around keep their answers."""
    race = Race(lambda tables, slot: tables.set(slot, tables.leaf(DATA + 9 * PAGE, 3)), op)
    race.r.tables.map(4 * PAGE, DATA + 4 * PAGE)
    race.r.tables.map(6 * PAGE, DATA + 6 * PAGE)
    rows = race.r.vcpu.fault_many([5 * PAGE, 4 * PAGE, 6 * PAGE, 5 * PAGE])
    assert rows["kind"].tolist() == [MAPPED, MAPPED, MAPPED, HIT]
    assert ((rows["cipa"] - DATA) // PAGE).tolist() == [9, 4, 6, 9]


def test_w6_a_tlbi_of_another_vmid_stops_nothing():
    """What the TLBI does not name is installed as it was walked."""
    race = Race(lambda tables, slot: tables.set(slot, tables.leaf(DATA + 9 * PAGE, 3)), "IPAS2E1IS")
    race.interfere = lambda: race.r.vm.vcpus[1].tlbi("VMALLS12E1IS", vttbr=race.r.tables.vttbr(2))
    assert race.r.fault(5 * PAGE).cipa == DATA + 5 * PAGE
    assert race.asked[0] == DATA + 5 * PAGE


# W7: RIPAS2E1 and RIPAS2LE1 (NSH) are accepted without FEAT_TLBIRANGE

RANGES = [f"RIPAS2{last}E1{share}{nxs}" for last in ("", "L") for share in ("", "IS", "OS") for nxs in ("", "NXS")]


@pytest.mark.parametrize("op", RANGES)
def test_w7_ranges_are_undefined_without_the_feature(op):
    """UNDEFINED, and nothing falls."""
    features = Features(range=False)
    r = Rig(features=features)
    r.tables.map(0, DATA)
    r.fault(0)
    with pytest.raises(UndefinedInstruction):
        r.vcpu.tlbi(op, span(0, 4 * K))
    with pytest.raises(UndefinedInstruction):
        decode_tlbi(op, span(0, 4 * K), features=features)
    assert r.leaves() == [(0, DATA, PAGE)]


# W8: a nested IPA beyond the host's limit or PARange is reported as a size fault or an external abort


@pytest.mark.parametrize("pa_bits", [36, 40, 44, 48])
def test_w8_large_address_is_l1s_translation_fault(pa_bits):
    """With stage 2 on, however large: beyond L1's input size, so its translation fault of level 0, at L1's EL2."""
    r = Rig(features=Features(pa_bits=pa_bits), host=False)
    tables = r.new_tables(start=2)  # 30 bits
    r.load(tables=tables)
    for ipa in (1 << pa_bits - 1, 1 << pa_bits, 1 << 48, 1 << 51, 1 << 63):
        for access in (READ, WRITE, EXEC, READ | PTW):
            f = r.fault(ipa, access)
            assert (f.kind, f.fsc, f.level) == (L1_FAULT, TRANSLATION_0, 0)


def test_w8_size_fault_is_l2s_own_with_stage2_off():
    """Only with stage 2 off is there a size fault, and it is no fault of L1's."""
    r = Rig(features=Features(pa_bits=40))
    r.load(hcr=0)
    for ipa in (1 << 40, 1 << 47):
        f = r.fault(ipa)
        assert (f.kind, f.fsc) == (HOST_FAULT, SIZE_0)


# W9: TG=00 of a range is taken for 64K, and its base is sign-extended from bit 48 whatever the granule


@pytest.mark.parametrize("op", RANGES)
def test_w9_reserved_granule_does_nothing(op):
    """TG=00: no leaf falls, nothing is owed."""
    r = Rig()
    r.tables.map_range(0, DATA, 16 * PAGE)
    for n in range(16):
        r.fault(n * PAGE)
    r.vm.take_tlbis()
    assert r.vcpu.tlbi(op, 31 << 39).removed == 0
    assert len(r.leaves()) == 16 and r.vm.take_tlbis().size == 0
    assert decode_tlbi(op, 31 << 39)[3:5] == (None, None)


@pytest.mark.parametrize("op", ["RVAE1IS", "RVAAE1", "RVALE1OS", "RVAALE1IS"])
def test_w9_reserved_granule_of_a_va_range(op):
    """By VA the same: nothing is owed."""
    r = Rig()
    r.vm.take_tlbis()
    r.vcpu.tlbi(op, 31 << 39)
    assert r.vm.take_tlbis().size == 0


@pytest.mark.parametrize("granule, sign", [(4 * K, 48), (16 * K, 50), (64 * K, 52)])
def test_w9_va_base_is_signed_by_its_own_top_bit(granule, sign):
    """The base is 37 bits of granules: the sign is bit 36 of the field, which is bit 48 for 4K alone."""
    features = Features(pa_bits=52, lpa=True, lpa2=True)
    positive = decode_tlbi("RVAE1IS", span(1 << 47, granule), features=features)
    assert positive.start == 1 << 47
    negative = decode_tlbi("RVAE1IS", span(1 << sign, granule), features=features)
    assert negative.start == (1 << 64) - (1 << sign)
    if sign > 48:
        assert decode_tlbi("RVAE1IS", span(1 << 48, granule), features=features).start == 1 << 48


@pytest.mark.parametrize("granule, top", [(16 * K, 49), (64 * K, 49), (64 * K, 51)])
def test_w9_ipa_base_has_no_sign_and_no_dropped_bits(granule, top):
    """By IPA the base is unsigned: one above the input size names nothing, no low address either."""
    r = Rig(granule=granule)
    r.tables.map_range(0, DATA & -granule, 2 * granule)
    for n in range(2):
        r.fault(n * granule)
    live = r.leaves()
    assert r.vcpu.tlbi("RIPAS2E1IS", span(1 << top, granule, scale=1)).removed == 0
    assert r.leaves() == live
    assert r.vcpu.tlbi("RIPAS2E1IS", span(0, granule, scale=1)).removed == len(live) > 0


# W11: HPFAR_EL2 that L1 sees may have KVM's private "valid" marker in bit 63


@pytest.mark.parametrize("access", [READ, WRITE, EXEC, READ | PTW])
def test_w11_hpfar_is_the_fault_address_alone(access):
    """HPFAR_EL2 is IPA[55:12] in bits 47:4, and bit 63 (NS, RES0 in Non-secure) is clear, whatever the fault."""
    r = Rig()
    r.tables.map(PAGE, DATA, perm="-")  # permission
    r.tables.map(2 * PAGE, DATA, af=0)  # access flag
    r.tables.map(3 * PAGE, 1 << 47, perm="rwx")  # nothing there: MMIO
    r.tables.map(4 * PAGE, DATA + PAGE)
    kinds = set()
    for ipa in (0, PAGE, 2 * PAGE, 3 * PAGE, 4 * PAGE, 5 * M, 1 << 39, 1 << 47, (1 << 56) - 1, 1 << 63, (1 << 64) - 1):
        f = r.fault(ipa, access)
        kinds.add(f.kind)
        assert f.hpfar == (ipa >> 12 & (1 << 44) - 1) << 4
        assert f.hpfar >> 48 == 0
    assert kinds == {L1_FAULT, MMIO, MAPPED}
