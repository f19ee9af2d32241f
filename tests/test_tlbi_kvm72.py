"""tlbi="kvm72": what Linux 7.2 removes (spec 03, section 5: O1 to O14 and 5.1), case by case and against the model."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings

import s2shadow
from lockstep import GRANULES
from model.tlbi import OPERATIONS
from rig import DATA, HOST, PAGE, RAM, G, K, M, Rig, single, span
from s2shadow import HCR_VM, MAPPED
from test_tlbi_exact import COUNT, FEATURES, LONG, MIX, Tlbis, run_seeded

P = PAGE


@dataclass
class Case:
    """L1 leaves by (ipa, level); addresses touched; removed and required: the shadow leaves (by ipa) that must go."""

    op: str
    xt: int
    removed: list
    required: list
    mapped: list = field(default_factory=lambda: [(ipa, 3) for ipa in LOW + FAR])
    touched: list = field(default_factory=lambda: LOW + FAR)
    granule: int = 4 * K
    host_pages: bool = False  # the host maps pages, else blocks of 2M


LOW, FAR = [0, P, 5 * P, 16 * P, 2 * M, 300 * M], [G]
BLOCK = {"mapped": [(4 * M, 2), (0, 3)], "touched": [4 * M, 0]}
SPLIT = {"mapped": [(4 * M, 2), (0, 3), (G, 3)], "host_pages": True}
PIECES = [4 * M, 4 * M + P]
PAGE16 = {"granule": 16 * K, "mapped": [(64 * K, 3), (M, 3), (32 * M, 3)]}
PAGE64 = {"granule": 64 * K, "mapped": [(64 * K, 3), (M, 3), (512 * M, 3)]}

CASES = {
    "leaf there, its tag says 4K": Case("IPAS2E1IS", single(P), [P], [P]),
    "NSH and OS are IS, nXS is XS, L is all": Case("IPAS2LE1OSNXS", single(P), [P], [P]),
    "leaf absent, the first of the 2M says 4K": Case("IPAS2E1IS", single(7 * P), LOW, []),
    "leaf absent, nothing says": Case("IPAS2E1IS", single(7 * P), LOW[1:], [], touched=LOW[1:] + FAR),
    "block there": Case("IPAS2E1IS", single(4 * M + 7 * P), [4 * M], [4 * M], **BLOCK),
    "block in pieces, the first there": Case(
        "IPAS2E1", single(4 * M + 7 * P), PIECES, PIECES, touched=[0, *PIECES, G], **SPLIT
    ),
    "block in pieces, the first absent": Case(
        "IPAS2E1", single(4 * M + 7 * P), [0, 4 * M + P], [4 * M + P], touched=[0, 4 * M + P, G], **SPLIT
    ),
    "16K, first piece there": Case(
        "IPAS2E1", single(76 * K), [64 * K, 72 * K], [64 * K, 72 * K], touched=[64 * K, 72 * K, M, 32 * M], **PAGE16
    ),
    "16K, first piece absent": Case(
        "IPAS2E1", single(76 * K), [72 * K, M], [72 * K], touched=[72 * K, M, 32 * M], **PAGE16
    ),
    "64K, first piece there": Case(
        "IPAS2E1", single(76 * K), [64 * K, 72 * K], [64 * K, 72 * K], touched=[64 * K, 72 * K, M, 512 * M], **PAGE64
    ),
    "64K, first piece absent": Case(
        "IPAS2E1", single(76 * K), [72 * K, M], [72 * K], touched=[72 * K, M, 512 * M], **PAGE64
    ),
    "64K, the page itself is not probed": Case(
        "IPAS2E1", single(72 * K), [72 * K, M], [72 * K], touched=[72 * K, M, 512 * M], **PAGE64
    ),
    "TTL 4K": Case("IPAS2E1", single(P, 4 * K, 3), [P], [P]),
    "TTL of another granule, trusted": Case("IPAS2E1", single(P, 16 * K, 3), [0, P], []),
    "TTL 64K over 4K": Case("IPAS2E1", single(17 * P, 64 * K, 3), [16 * P], []),
    "TTL 32M over 4K": Case("IPAS2E1", single(9 * P, 16 * K, 2), LOW[:5], []),
    "TTL 512M over 4K": Case("IPAS2E1", single(9 * P, 64 * K, 2), LOW, []),
    "TTL 2M over 4K": Case("IPAS2E1", single(9 * P, 4 * K, 2), LOW[:4], []),
    "TTL 1G over 4K": Case("IPAS2E1", single(9 * P, 4 * K, 1), LOW, []),
    "TTL 4K under a block takes it whole": Case("IPAS2E1", single(4 * M + P, 4 * K, 3), [4 * M], [], **BLOCK),
    "TTL without granule: no inference": Case("IPAS2E1", single(P) | 1 << 44, LOW, [P]),
    "TTL of a reserved level: no inference": Case("IPAS2E1", single(P, 16 * K, 1), LOW, [P]),
    "TTL of level 0: no inference": Case("IPAS2E1", single(P, 4 * K, 0), LOW, [P]),
    "TTL of a reserved level, 16K": Case(
        "IPAS2E1", single(72 * K, 64 * K, 1), [64 * K, M], [64 * K], touched=[64 * K, M, 32 * M], **PAGE16
    ),
    "range": Case("RIPAS2E1", span(0, 4 * K), [0, P], [0, P]),
    "range, TTL ignored": Case("RIPAS2E1", span(0, 4 * K, ttl=2), [0, P], []),
    "range, TG of another granule": Case("RIPAS2LE1IS", span(0, 64 * K), [0, P, 5 * P, 16 * P], []),
    "range, TG=00 is 64K": Case("RIPAS2E1", 1, [16 * P], []),
    "range, TG=00 is 64K, of 64K pages too": Case(
        "RIPAS2E1", 1, [64 * K], [], touched=[64 * K, M], **PAGE64
    ),
    "range over part of a block": Case("RIPAS2E1", span(4 * M + 8 * K, 4 * K), [4 * M], [4 * M], **BLOCK),
    "range over part of a block, another level": Case("RIPAS2E1", span(4 * M, 4 * K, ttl=3), [4 * M], [], **BLOCK),
    "range beside the pieces of a block": Case(
        "RIPAS2E1", span(4 * M + 8 * P, 4 * K), [], [], touched=[4 * M, G], **SPLIT
    ),
    "range, negative base": Case("RIPAS2E1", span(1 << 48, 64 * K, 3, 31), [], []),
    "range, bits 52:49 of the base dropped": Case("RIPAS2E1", span(1 << 49, 64 * K), [0, P, 5 * P, 16 * P], []),
    "range, base beyond the input size": Case("RIPAS2E1", span(1 << 47, 4 * K, 3, 31), [], []),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_case(case):
    """The leaves that go, and beside them how many of these had to."""
    r = Rig(tlbi="kvm72", granule=case.granule, host=not case.host_pages)
    if case.host_pages:
        for at in range(0, 4 * M, P):
            r.vm.host.map(RAM + at, HOST + RAM + at, P)
    for ipa, level in case.mapped:
        r.tables.map(ipa, RAM + 2 * M, level)
    for ipa in case.touched:
        assert r.fault(ipa).kind == MAPPED
    assert sorted(leaf[0] for leaf in r.leaves()) == sorted(case.touched)
    got = r.vcpu.tlbi(case.op, case.xt)
    assert {leaf[0] for leaf in r.leaves()} == set(case.touched) - set(case.removed)
    assert (got.removed, got.required) == (len(case.removed), len(case.required))
    counted = r.vm.stats.tlbis["RANGE" if OPERATIONS[case.op].range else "IPA"]
    assert tuple(counted) == (1, 1, len(case.removed), len(case.required))
    r.vm.check()


def test_level_0_has_no_tag():
    """Two bits of tag say nothing of a 512G leaf: 1 GiB around the address goes, the rest of the leaf stays."""
    r = Rig(tlbi="kvm72", features=s2shadow.Features(lpa2=True), contexts=4)
    tables = r.new_tables(vtcr=1 << 32, start=0)
    r.load(1, tables)
    tables.map(512 * G, 0, 0, sh=0)
    for at in (DATA, DATA + 8 * M):
        assert r.fault(512 * G + at).kind == MAPPED
    assert r.vcpu.tlbi("IPAS2E1IS", single(512 * G + 2 * G)).removed == 0
    got = r.vcpu.tlbi("IPAS2E1IS", single(512 * G + DATA))
    assert (got.removed, got.required) == (2, 2)


def with_stage2_off():
    """VMID 1 with stage 2 on and off, each with a leaf at DATA."""
    r = Rig(tlbi="kvm72", contexts=4)
    r.tables.map(DATA, DATA)
    for hcr in (0, HCR_VM):
        r.load(1, hcr=hcr)
        assert r.fault(DATA).kind == MAPPED
    return r


@pytest.mark.parametrize(
    ("op", "xt"),
    [("IPAS2E1IS", single(DATA)), ("IPAS2E1", single(DATA, 4 * K, 3)), ("RIPAS2E1", span(DATA, 4 * K))],
)
def test_stage2_off_is_hit(op, xt):
    """Contexts of the VMID with stage 2 off lose leaves that nothing required."""
    got = with_stage2_off().vcpu.tlbi(op, xt)
    assert tuple(got)[1:] == (2, 1, 2)


def test_stage2_off_alone_is_hit():
    """Also when the VMID has no other context; another VMID is not."""
    r = Rig(tlbi="kvm72", contexts=4)
    for vmid in (1, 2):
        r.load(vmid, hcr=0)
        r.fault(DATA)
    got = r.vcpu.tlbi("IPAS2E1IS", single(DATA + 8 * M), vttbr=1 << 48)
    assert (got.removed, got.required) == (1, 0)
    assert r.vm.stats.live == 1


def test_largest_by_context():
    """Without a hint each context of the VMID loses what its own granule makes the largest block."""
    r = Rig(tlbi="kvm72", contexts=4)
    wide = r.new_tables(granule=64 * K)
    for tables in (r.tables, wide):
        r.load(1, tables)
        for ipa in (0, 256 * M, 600 * M):
            tables.map(ipa, DATA)
            r.fault(ipa)
    got = r.vcpu.tlbi("IPAS2E1IS", single(M))
    assert (got.removed, got.required, got.contexts) == (5, 0, 2)


def test_range_limit_is_the_pa_size():
    """O9: a range is cut at 2^PA, not at the input size of the VTTBR in force: another context of the VMID is hit."""
    r = Rig(tlbi="kvm72", contexts=4)
    wide = r.new_tables(granule=64 * K)
    r.load(1, wide)
    wide.map(1 << 40, DATA)
    assert r.fault(1 << 40).kind == MAPPED
    assert r.vcpu.tlbi("RIPAS2E1", span(1 << 40, 64 * K), vttbr=r.tables.vttbr(1), vtcr=r.tables.vtcr).removed == 1


@pytest.mark.parametrize(("op", "left"), [("VMALLS12E1", 1), ("VMALLS12E1OSNXS", 1), ("ALLE1", 0), ("ALLE1IS", 0)])
def test_whole(op, left):
    """By VMID and all: as the architecture has it, all of it required."""
    r = with_stage2_off()
    r.load(2)
    r.fault(DATA)
    got = r.vcpu.tlbi(op, vttbr=1 << 48)
    assert got.removed == got.required == 3 - left
    assert r.vm.stats.live == left


@pytest.mark.parametrize("op", [name for name, op in OPERATIONS.items() if op.regime in ("EL10_S1", "EL2_S1")])
def test_stage1_removes_nothing(op):
    """Stage-1 operations take no leaf here either."""
    r = with_stage2_off()
    got = r.vcpu.tlbi(op, span(DATA, 4 * K))
    assert (got.removed, got.required, r.vm.stats.live) == (0, 0, 2)


def test_unknown_dialect():
    """The message names the argument."""
    with pytest.raises(ValueError, match="tlbi"):
        s2shadow.NestedVM(s2shadow.GuestMemory(), tlbi="kvm71")


class TlbisKvm72(Tlbis):
    dialect = "kvm72"


TestKvm72 = TlbisKvm72.TestCase
TestKvm72.settings = settings(max_examples=1000 if LONG else 40, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("granules", GRANULES, ids=str)
def test_seeded(granules, features):
    """Full shadows: what goes and what of it had to, after every TLBI; more goes than had to."""
    done = run_seeded("kvm72", 21, COUNT, MIX, granules=granules, features=features, populate=2 * M)
    for kind in ("IPA", "RANGE"):
        assert done[kind, "removed"] > done[kind, "required"] > 0
    assert done["VMALLS12", "removed"] == done["VMALLS12", "required"]


def test_host_16k():
    """The same on a host with 16K pages."""
    done = run_seeded("kvm72", 22, COUNT, MIX, granules=(16 * K, 64 * K), host_granule=16 * K)
    assert done["IPA", "removed"] > done["IPA", "required"] > 0
