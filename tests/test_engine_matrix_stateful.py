"""Machines of every kind, step by step: hypothesis chooses machine, formats of L1 and sequence, and shrinks them."""

import os
import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

import machines
import tlbistep
from lockstep import OTHER_S2PIR, SLOTS
from rig import MRO, S2PIR
from s2shadow import HCR_CD, HCR_PTW
from test_engine_stateful import PAGES, PERM
from test_tlbi_exact import Tlbis
from tlbistep import TlbiPair

LONG = os.environ.get("S2SHADOW_LONG") == "1"
OFFSET = st.integers(0, 11)
TABLE = st.integers(0, 1)


class Machines(Tlbis):
    """The rules of Tlbis, and what 52-bit addresses, dirty state, indirection, CD and PTW add."""

    @initialize(
        host_granule=st.sampled_from(machines.GRANULES), pa_bits=st.sampled_from(machines.PA_BITS),
        hafdbs=st.integers(0, 2), s2pie=st.booleans(), vcpus=st.integers(1, 2), draw=st.integers(0, 1 << 16),
    )  # fmt: skip
    def start(self, host_granule, pa_bits, hafdbs, s2pie, vcpus, draw):
        machine = machines.random_machine(random.Random(draw), host_granule, pa_bits, hafdbs, s2pie)
        self.pair = TlbiPair(vcpus=vcpus, **machine)
        for slot in range(tlbistep.SLOTS):
            for table in (0, 1):
                self.pair.l1_map(table, self.pair.ipa(slot), 3 - slot % 2, 3 * slot, clean=slot % 3 == 0)

    @rule(
        n=TABLE, slot=st.integers(0, SLOTS - 1), offset=OFFSET, access=st.sampled_from([1, 1, 2, 2, 17, 18, 18, 19, 4])
    )
    def fault_near(self, n, slot, offset, access):
        self.pair.fault(n, self.pair.ipa(slot, offset), access)

    @rule(n=TABLE, table=TABLE, block=TABLE, near=st.sampled_from([0, 0, 1]), inside=st.integers(0, 1 << 45))
    def fault_huge(self, n, table, block, near, inside):
        inside = self.pair.data + inside % 1024 * self.pair.page if near else inside & -self.pair.page
        self.pair.fault(n, self.pair.huge_ipa(table, block, inside), 1)

    @rule(n=TABLE, vmid=st.integers(1, 3), table=TABLE, hcr=st.sampled_from([0, HCR_CD, HCR_PTW, HCR_PTW | HCR_CD]),
          s2pir=st.sampled_from([S2PIR, S2PIR, OTHER_S2PIR]))  # fmt: skip
    def load_more(self, n, vmid, table, hcr, s2pir):
        self.pair.load(n, vmid, table, True, hcr, s2pir)

    @rule(
        table=TABLE, slot=st.integers(0, SLOTS - 1), offset=OFFSET, page=PAGES, perm=PERM | st.just(MRO),
        memattr=st.integers(0, 15), sh=st.integers(0, 3), young=st.booleans(), tlbi=st.booleans(), clean=st.booleans(),
    )  # fmt: skip
    def l1_maps_more(self, table, slot, offset, **fields):
        self.pair.l1_map(table, self.pair.ipa(slot, offset), 3, **fields)

    @rule(
        table=TABLE, slot=st.integers(0, SLOTS - 1), offset=OFFSET, perm=PERM | st.just(MRO),
        memattr=st.sampled_from([15, 15, 5, 1, 6, 7]), sh=st.integers(0, 3), clean=st.booleans(), tlbi=st.booleans(),
    )  # fmt: skip
    def l1_changes(self, table, slot, offset, **fields):
        self.pair.l1_change(table, self.pair.ipa(slot, offset), **fields)

    @rule(table=TABLE, slot=st.integers(0, SLOTS - 1), offset=OFFSET, tlbi=st.booleans())
    def l1_cleans(self, table, slot, offset, tlbi):
        self.pair.l1_clean(table, self.pair.ipa(slot, offset), tlbi)

    @rule(table=TABLE, block=TABLE, perm=PERM, to_huge=st.booleans())
    def l1_maps_huge(self, table, block, perm, to_huge):
        self.pair.l1_map_huge(table, block, perm, to_huge)

    @rule(page=PAGES, length=st.sampled_from([1, 16, 512, 2048]), memattr=st.integers(0, 15))
    def host_map_memattr(self, page, length, memattr):
        self.pair.host_map(page, length, memattr=memattr)

    @rule()
    def host_map_huge(self):
        self.pair.host_map_huge()

    @rule()
    def look_from_outside(self):
        self.pair.check_hardware()


TestMachines = Machines.TestCase
TestMachines.settings = settings(max_examples=2000 if LONG else 40, stateful_step_count=40, deadline=None)
