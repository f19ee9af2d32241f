"""Memory attributes through the engine: L1's leaf of each type over the host's of each type, FWB on and off."""

import csv
import itertools
from pathlib import Path

import pytest

from model.combine import combine_memattr, combine_sh
from rig import DATA, HOST, PAGE, Rig
from s2shadow import HCR_CD, HCR_FWB, HCR_VM, MAPPED, Features

TABLE = Path(__file__).parent / "data" / "spec" / "memattr_compose.csv"
ROWS = list(csv.DictReader(TABLE.read_text().splitlines()))
CODES = range(16)
IPA = 0x12_3000


class Attributes:
    """One host page for each of the host's codes, and one leaf of L1's that is pointed at them in turn."""

    def __init__(self, host_fwb, hcr=0):
        self.r = Rig(features=Features(fwb=host_fwb), host=False)
        for code in CODES:
            self.r.vm.host.map(DATA + code * PAGE, HOST + DATA + code * PAGE, PAGE, memattr=code)
        self.context = self.r.load(hcr=HCR_VM | hcr).index

    def shadow(self, guest, host, sh=3):
        """(MemAttr, SH) of the shadow leaf."""
        self.r.tables.map(IPA, DATA + host * PAGE, memattr=guest, sh=sh)
        assert self.r.fault(IPA).kind == MAPPED
        (row,) = self.r.shadow(self.context)
        self.r.vcpu.tlbi("ALLE1IS")
        desc = row["desc"].item()
        assert (desc >> 2 & 15, desc >> 8 & 3) == (row["memattr"], row["sh"])
        return int(row["memattr"]), int(row["sh"])


def code(text):
    return int(text, 2)


@pytest.mark.parametrize(("l1_fwb", "l0_fwb"), [(0, 0), (0, 1), (1, 1)])
def test_rows(l1_fwb, l0_fwb):
    """Every composition of the specification that a machine can have: with FWB the host uses it."""
    machine = Attributes(bool(l0_fwb), HCR_FWB * l1_fwb)
    rows = [row for row in ROWS if (row["l1_fwb"], row["l0_fwb"]) == (str(l1_fwb), str(l0_fwb))]
    assert len(rows) == 49
    for row in rows:
        got, _ = machine.shadow(code(row["l1_memattr"]), code(row["l0_memattr"]))
        assert got == code(row["shadow_memattr"]), row


def test_fwb_without_the_feature():
    """HCR.FWB is RES0 there: the remaining rows are those without FWB on either side."""
    machine = Attributes(False, HCR_FWB)
    rows = [row for row in ROWS if (row["l1_fwb"], row["l0_fwb"]) == ("0", "0")]
    for row in rows:
        got, _ = machine.shadow(code(row["l1_memattr"]), code(row["l0_memattr"]))
        assert got == code(row["shadow_memattr"]), row


@pytest.mark.parametrize("hcr", [0, HCR_CD], ids=["", "cd"])
@pytest.mark.parametrize(("l1_fwb", "l0_fwb"), [(0, 0), (0, 1), (1, 1)])
def test_every_code(l1_fwb, l0_fwb, hcr):
    """All 16 codes on both sides, mixed and reserved ones too, and the shareability that comes with them."""
    machine = Attributes(bool(l0_fwb), HCR_FWB * l1_fwb | hcr)
    for guest, host, sh in itertools.product(CODES, CODES, (0, 1, 2, 3)):
        want = combine_memattr(guest, host, bool(l1_fwb), bool(l0_fwb), bool(hcr))
        assert machine.shadow(guest, host, sh) == (want, combine_sh(sh, 3, want, bool(l0_fwb))), (guest, host, sh)


@pytest.mark.parametrize("l0_fwb", [0, 1])
def test_cd_by_hand(l0_fwb):
    """HCR.CD: what L1 maps as write-back is Non-cacheable to L2; Device stays Device; a forcing host has its way."""
    machine = Attributes(bool(l0_fwb), HCR_CD)
    as_stage1, non_cacheable, ngnre = (0b0111 if l0_fwb else 0b1111), 0b0101, 0b0001
    assert machine.shadow(0b1111, as_stage1) == (non_cacheable, 2)
    assert machine.shadow(ngnre, as_stage1) == (ngnre, 2)
    if l0_fwb:
        assert machine.shadow(0b1111, 0b0110) == (0b0110, 3)
