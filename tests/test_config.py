"""Features and Stage2Config: what the registers decode to."""

import csv
import dataclasses
from pathlib import Path

import pytest

import s2shadow
from s2shadow import HCR_DC, HCR_FWB, HCR_VM, Features, Stage2Config

TABLE = Path(__file__).parent / "data" / "spec" / "s2_start_levels.csv"
ROWS = list(csv.DictReader(TABLE.read_text().splitlines()))
SIZES = {"4K": 4096, "16K": 16384, "64K": 65536}
TG0 = {"4K": 0, "64K": 1, "16K": 2}
NARROW = Features(ttst=False)
SMALL = Features(ttst=True)
WIDE = Features(pa_bits=52, lpa=True, lpa2=True, ttst=True)
BAD = "translation fault, level 0"


def vtcr_of(row, ia, ds=0, ps=5):
    levels = int(row["SL0"]) << 6 | int(row["SL2"]) << 33
    return (64 - ia) & 63 | levels | TG0[row["granule"]] << 14 | ps << 16 | ds << 32


def legal_sizes(row, column_min, column_max):
    return range(int(row[column_min]), int(row[column_max]) + 1)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r['granule']}-{r['SL2']}{r['SL0']}")
class TestStartLevels:
    """Every row of s2_start_levels.csv, for every input size from 1 to 64 bits."""

    def check(self, row, feat, ds, legal):
        for ia in range(1, 65):
            cfg = Stage2Config(0, vtcr_of(row, ia, ds), features=feat)
            if int(row["SL2"]) > ds:
                assert cfg.error == Stage2Config(0, vtcr_of(row, ia) & ~(1 << 33), features=feat).error
                continue  # without DS, SL2 is ignored
            assert cfg.granule == SIZES[row["granule"]]
            assert cfg.error == (None if ia in legal else BAD), ia
            if ia in legal:
                assert cfg.start_level == int(row["start_level"])
                assert cfg.ia_bits == ia
                extra = ia - int(row["entry_shift"]) - int(row["stride"])
                assert cfg.concatenated == 1 << max(0, extra)
                assert (cfg.concatenated > 1) == (ia >= int(row["concat_from_ia"]))

    def test_48_bits(self, row):
        """48-bit machine with FEAT_TTST: no level -1, no 52-bit sizes."""
        needs_ds = "DS=1" in row["condition"]
        self.check(row, SMALL, 0, () if needs_ds else legal_sizes(row, "ia_min_TTST", "ia_max_48"))

    def test_no_small_tables(self, row):
        """Without FEAT_TTST inputs have at least 25 bits; 4K cannot start at level 3."""
        needs_ds = "DS=1" in row["condition"]
        legal = legal_sizes(row, "ia_min_noTTST", "ia_max_48")
        self.check(row, NARROW, 0, () if needs_ds or row["condition"] == "FEAT_TTST" else legal)

    def test_52_bits(self, row):
        """FEAT_LPA2: with DS (or 64K) every row is legal up to 52 bits."""
        ds = int(row["granule"] != "64K")
        self.check(row, WIDE, ds, legal_sizes(row, "ia_min_TTST", "ia_max_52"))

    def test_base_alignment(self, row):
        """The base is forced down to the size of the whole start table."""
        ds = int("DS=1" in row["condition"])
        feat = WIDE if ds else SMALL
        junk = 0x0000_7FFF_FFFF_FFC0
        for ia in legal_sizes(row, "ia_min_TTST", "ia_max_52" if ds else "ia_max_48"):
            align = max(ia - int(row["base_align_log2"].removeprefix("IA-")), 6 if ds else 4)
            cfg = Stage2Config(junk, vtcr_of(row, ia, ds), features=feat)
            assert cfg.baddr == junk >> align << align
            assert cfg.error is None


def test_reserved_start_levels():
    """SL0 values without a start level, and SL2 with anything but SL0 = 0."""
    assert Stage2Config(0, (64 - 40) | 3 << 6 | 1 << 14 | 5 << 16, features=SMALL).error == BAD
    for sl0 in (1, 2, 3):
        for ia in (40, 48, 50, 52):
            vtcr = (64 - ia) | sl0 << 6 | 5 << 16 | 1 << 32 | 1 << 33
            assert Stage2Config(0, vtcr, features=WIDE).error == BAD


@pytest.mark.parametrize(
    ("pa_bits", "granule", "sl0", "ia", "legal"),
    [
        (42, 0, 2, 40, False),
        (44, 0, 2, 40, True),
        (42, 1, 2, 42, False),
        (42, 1, 2, 43, False),
        (44, 1, 2, 43, True),
        (40, 2, 2, 38, False),
        (42, 2, 2, 38, True),
        (40, 0, 1, 40, True),
        (40, 0, 1, 41, False),
        (36, 0, 1, 37, False),
    ],
)
def test_small_machines(pa_bits, granule, sl0, ia, legal):
    """Start levels and input sizes that a small physical address space rules out."""
    cfg = Stage2Config(0, (64 - ia) | sl0 << 6 | granule << 14 | 5 << 16, features=Features(pa_bits=pa_bits))
    assert (cfg.error is None) == legal


@pytest.mark.parametrize(("ps", "bits"), list(enumerate((32, 36, 40, 42, 44, 48))))
@pytest.mark.parametrize("pa_bits", [32, 40, 48])
def test_output_size(ps, bits, pa_bits):
    """PS, capped by the machine."""
    ia = min(32, pa_bits)
    cfg = Stage2Config(0, (64 - ia) | 1 << 6 | ps << 16, features=Features(pa_bits=pa_bits))
    assert cfg.oa_bits == min(bits, pa_bits)


@pytest.mark.parametrize(
    ("feat", "vtcr", "bits"),
    [
        (WIDE, 24 | 1 << 6 | 6 << 16 | 1 << 32, 52),
        (WIDE, 24 | 1 << 6 | 7 << 16 | 1 << 32, 52),
        (WIDE, 24 | 1 << 6 | 1 << 14 | 6 << 16, 52),
        (Features(pa_bits=52, lpa=True), 24 | 1 << 6 | 6 << 16, 48),
        (Features(), 24 | 1 << 6 | 6 << 16, 48),
        (Features(), 24 | 1 << 6 | 7 << 16, 48),
    ],
)
def test_wide_output_size(feat, vtcr, bits):
    """PS = 52 bits, and the reserved value that acts like it."""
    assert Stage2Config(0, vtcr, features=feat).oa_bits == bits


@pytest.mark.parametrize(
    ("vs", "vmid_bits", "vmid"), [(0, 8, 0xCD), (0, 16, 0xCD), (1, 8, 0xCD), (1, 16, 0xABCD)]
)  # fmt: skip
def test_vmid(vs, vmid_bits, vmid):
    """Sixteen bits only if the machine has them and VS asks for them; CnP is no part of anything."""
    feat = Features(vmid_bits=vmid_bits)
    cfg = Stage2Config(0xABCD << 48 | 0x8000_0001, 24 | 1 << 6 | 5 << 16 | vs << 19, features=feat)
    assert cfg.vmid == vmid
    assert cfg.baddr == 0x8000_0000


def test_wide_base():
    """VTTBR[5:2] are base bits 51:48, with DS or with 64K and PS = 52 bits, and only then."""
    vttbr = 0x8000_0000 | 0b1010 << 2
    wide = 10 << 48 | 0x8000_0000
    assert Stage2Config(vttbr, 24 | 1 << 6 | 6 << 16 | 1 << 32, features=WIDE).baddr == wide
    assert Stage2Config(vttbr, 24 | 1 << 6 | 6 << 16 | 1 << 14, features=WIDE).baddr == wide
    assert Stage2Config(vttbr, 24 | 1 << 6 | 5 << 16 | 1 << 14, features=WIDE).baddr == 0x8000_0000
    assert Stage2Config(vttbr, 24 | 1 << 6 | 6 << 16, features=WIDE).baddr == 0x8000_0000


def test_base_out_of_range():
    """A table beyond the output size: an address size fault at level 0, whatever the address."""
    cfg = Stage2Config(1 << 40, 24 | 1 << 6 | 2 << 16)
    assert cfg.error == "address size fault, level 0"
    w = s2shadow.walk(s2shadow.GuestMemory(), cfg, 0)
    assert (w.fault, w.fsc, w.level) == (cfg.error, 0, 0)
    assert s2shadow.walk(s2shadow.GuestMemory(), cfg, 1 << 40).fsc == 4


def test_error_is_what_walks_answer():
    """An illegal configuration is no exception: every walk takes its fault."""
    cfg = Stage2Config(0, 0)
    assert cfg.error == BAD
    for ipa in (0, 1 << 30, (1 << 64) - 1):
        w = s2shadow.walk(s2shadow.GuestMemory(), cfg, ipa)
        assert (w.status, w.fault, w.fsc, w.level, w.desc_addr) == (1, BAD, 4, 0, 0)


@pytest.mark.parametrize("granules", [(4096,), (16384,), (65536,), (16384, 65536)])
def test_missing_granule(granules):
    """A TG0 that is reserved or not advertised acts as the smallest granule that is."""
    feat = Features(granules=granules)
    for tg0, size in ((0, 4096), (1, 65536), (2, 16384), (3, None)):
        cfg = Stage2Config(0, 24 | 1 << 6 | tg0 << 14 | 5 << 16, features=feat)
        assert cfg.granule == (size if size in granules else min(granules))


@pytest.mark.parametrize(("hcr", "on"), [(0, False), (HCR_VM, True), (HCR_DC, True), (HCR_FWB, False)])
def test_enabled(hcr, on):
    """VM or DC switch stage 2 on. Off, an illegal VTCR faults nothing."""
    assert Stage2Config(0, 24 | 1 << 6 | 5 << 16, hcr=hcr).enabled == on
    bad = Stage2Config(0, 0, hcr=hcr)
    assert bad.error == (BAD if on else None)
    assert s2shadow.walk(s2shadow.GuestMemory(), bad, 0x1234).status == int(on)


def test_stage2_off():
    """Off, an address is its own translation, as far as the machine's addresses reach."""
    feat = Features(pa_bits=40)
    for hcr, memattr in ((0, 15), (HCR_FWB, 7)):
        w = s2shadow.walk(s2shadow.GuestMemory(), Stage2Config(0, 0, features=feat, hcr=hcr), 0x12_3456_7890)
        assert (w.status, w.pa, w.level, w.perm, w.memattr, w.sh) == (0, 0x12_3456_7890, -2, 39, memattr, 3)
        assert (w.size, w.desc, w.desc_addr, w.updated) == (1 << 40, 0, 0, 0)
    w = s2shadow.walk(s2shadow.GuestMemory(), Stage2Config(0, 0, features=feat, hcr=0), 1 << 40)
    assert (w.status, w.fsc, w.level, w.fault) == (1, 0, 0, "address size fault, level 0")


def test_registers_are_kept():
    """What was written can be read back."""
    cfg = Stage2Config(0x1_8000_0001, 0x8002_3558, hcr=0x8000_0001, big_endian=True)
    assert (cfg.vttbr, cfg.vtcr, cfg.hcr, cfg.big_endian) == (0x1_8000_0001, 0x8002_3558, 0x8000_0001, True)
    assert cfg.features == Features()


@pytest.mark.parametrize("value", [0, (1 << 64) - 1, 0x5555_5555_5555_5555, 0xAAAA_AAAA_AAAA_AAAA])
def test_any_register_value(value):
    """Nothing that L1 writes into a register makes the constructor fail."""
    for other in (0, (1 << 64) - 1):
        for hcr in (0, HCR_VM, (1 << 64) - 1):
            cfg = Stage2Config(value, other, hcr=hcr, s2pir=value)
            s2shadow.walk(s2shadow.GuestMemory(), cfg, value)


# Features


def test_features_defaults():
    """As the API says, and equal if equal."""
    feat = Features()
    assert (feat.pa_bits, feat.granules, feat.hafdbs, feat.vmid_bits) == (48, (4096, 16384, 65536), 1, 16)
    assert (feat.xnx, feat.fwb, feat.ttl, feat.range, feat.tlbios, feat.xs) == (True,) * 6
    assert (feat.lpa2, feat.lpa, feat.ttst, feat.bbm, feat.s2pie) == (False,) * 5
    assert feat.host_granule == 4096
    assert feat == Features() and hash(feat) == hash(Features())
    assert feat != Features(xnx=False)


def test_features_frozen():
    """They cannot be changed behind an engine's back."""
    with pytest.raises((AttributeError, dataclasses.FrozenInstanceError)):
        Features().pa_bits = 52


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pa_bits", 0),
        ("pa_bits", 47),
        ("pa_bits", 64),
        ("granules", ()),
        ("granules", (8192,)),
        ("hafdbs", 3),
        ("hafdbs", -1),
        ("vmid_bits", 12),
        ("host_granule", 8192),
        ("host_granule", 0),
    ],
)
def test_features_refused(name, value):
    """A value that no machine has: ValueError that names it."""
    with pytest.raises(ValueError, match=name.rstrip("s")):
        Features(**{name: value})


@pytest.mark.parametrize(("host", "granules"), [(16384, (16384, 65536)), (65536, (65536,))])
def test_granules_below_host(host, granules):
    """Granules below the host's are refused if named, and left out of the default."""
    assert Features(host_granule=host).granules == granules
    with pytest.raises(ValueError):
        Features(host_granule=host, granules=(4096, 16384, 65536))
