"""Engine against model, step by step: hypothesis chooses loads, faults, L1's edits, TLBIs and host changes.

Several contexts, aliases, leaves of all sizes and granules, table edits with and without a TLBI. After each step the
answers, every shadow, the host's table and L1's tables must be equal, and vm.check() must hold.
"""

import os

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import lockstep
from lockstep import ALIASES, GRANULES, SLOTS

LONG = os.environ.get("S2SHADOW_LONG") == "1"

PERM = st.sampled_from(["r", "rw", "rx", "rwx", "rwx", "w", "rp", "ru", ""])
HOST_PERM = st.sampled_from(["rwx", "rwx", "rw", "rx", "r"])
ACCESS = st.sampled_from([1, 1, 2, 2, 3, 4, 4 | 8, 1 | 8, 2 | 8, 5, 7])
PAGES = st.integers(0, lockstep.DATA_PAGES - 1)
LENGTH = st.sampled_from([1, 1, 1, 2, 3, 16, 512, 600, 1024, lockstep.DATA_PAGES])


class Lockstep(RuleBasedStateMachine):
    """Rules draw small numbers; lockstep.Pair turns them into addresses and does them on both sides."""

    @initialize(
        granules=st.sampled_from(GRANULES),
        vcpus=st.integers(1, 2),
        populate=st.sampled_from([None, None, 4096, 2 << 20]),
        fwb=st.booleans(),
        xnx=st.booleans(),
        ha=st.booleans(),
        teardown=st.sampled_from(["reverse-map", "reverse-map", "interval-map"]),
    )
    def start(self, granules, vcpus, populate, fwb, xnx, ha, teardown):
        self.pair = lockstep.Pair(granules, vcpus, populate, fwb, xnx, ha, teardown=teardown)

    vcpu = st.integers(0, 1)

    @rule(n=vcpu, vmid=st.integers(1, 3), table=st.integers(0, 1), on=st.sampled_from([True, True, True, False]))
    def load(self, n, vmid, table, on):
        self.pair.load(n, vmid, table, on)

    @rule(n=vcpu)
    def put(self, n):
        self.pair.put(n)

    @rule(n=vcpu, slot=st.integers(0, SLOTS - 1), offset=st.integers(0, 511), access=ACCESS)
    def fault(self, n, slot, offset, access):
        self.pair.fault(n, self.pair.ipa(slot, offset), access)

    @rule(n=vcpu, page=PAGES, access=ACCESS)
    def fault_canonical(self, n, page, access):
        """An address that means something with stage 2 off."""
        self.pair.fault(n, self.pair.data + page * self.pair.page, access)

    @rule(n=vcpu, slots=st.lists(st.integers(0, SLOTS * 8 - 1), max_size=20), access=ACCESS)
    def batch(self, n, slots, access):
        self.pair.fault_many(n, [self.pair.ipa(slot // 8, slot % 8 * 3) for slot in slots], access)

    @rule(n=vcpu, slot=st.integers(0, SLOTS - 1), access=ACCESS)
    def translate(self, n, slot, access):
        self.pair.translate(n, self.pair.ipa(slot, 0), access)

    @rule(
        table=st.integers(0, 1), slot=st.integers(0, SLOTS - 1), offset=st.integers(0, 15), level=st.integers(1, 3),
        page=PAGES, perm=PERM, memattr=st.sampled_from([15, 15, 15, 5, 1, 6, 7]), sh=st.sampled_from([3, 3, 2, 0]),
        young=st.booleans(), tlbi=st.booleans(),
    )  # fmt: skip
    def l1_maps(self, table, slot, offset, level, page, perm, memattr, sh, young, tlbi):
        """L1 writes a leaf, and may or may not invalidate what was there."""
        self.pair.l1_map(table, self.pair.ipa(slot, offset), level, page, perm, memattr, sh, young, tlbi)

    @rule(table=st.integers(0, 1), alias=st.sampled_from(ALIASES), page=PAGES, perm=PERM)
    def l1_maps_run(self, table, alias, page, perm):
        """L1 maps eight pages in a row, often the same ones under another address."""
        self.pair.l1_map_run(table, alias, page, perm)

    @rule(table=st.integers(0, 1), slot=st.integers(0, SLOTS - 1), level=st.integers(1, 3), tlbi=st.booleans())
    def l1_unmaps(self, table, slot, level, tlbi):
        self.pair.l1_unmap(table, self.pair.ipa(slot, 0), level, tlbi)

    @rule(n=vcpu, op=st.sampled_from(["ALLE1IS", "VMALLS12E1", "VMALLS12E1IS"]), vmid=st.integers(1, 4))
    def tlbi(self, n, op, vmid):
        self.pair.tlbi(n, op, vmid)

    @rule(n=vcpu, slot=st.integers(0, SLOTS - 1), offset=st.integers(0, 511), vmid=st.integers(1, 3))
    def tlbi_ipa(self, n, slot, offset, vmid):
        self.pair.tlbi_ipa(n, self.pair.ipa(slot, offset), vmid)

    @rule(page=PAGES, length=LENGTH, shift=st.sampled_from([0, 0, 0, 1, 512]), perm=HOST_PERM)
    def host_map(self, page, length, shift, perm):
        self.pair.host_map(page, length, shift, perm)

    @rule()
    def host_map_gigabyte(self):
        self.pair.host_map_gigabyte()

    @rule(page=PAGES, length=LENGTH, partial=st.sampled_from(["split", "split", "drop", None]))
    def unmap(self, page, length, partial):
        self.pair.unmap(page, length, partial)

    @rule(page=PAGES, length=LENGTH, perm=HOST_PERM)
    def protect(self, page, length, perm):
        self.pair.protect(page, length, perm)

    @rule(page=PAGES, length=LENGTH, on=st.booleans())
    def log_dirty(self, page, length, on):
        self.pair.log_dirty(page, length, on)

    @rule(page=PAGES, length=LENGTH)
    def dirty_log(self, page, length):
        self.pair.dirty_log(page, length)

    @rule(page=PAGES, length=LENGTH, clear=st.booleans())
    def young(self, page, length, clear):
        self.pair.young(page, length, clear)

    @precondition(lambda self: hasattr(self, "pair"))
    @invariant()
    def agree(self):
        self.pair.check()


TestLockstep = Lockstep.TestCase
TestLockstep.settings = settings(max_examples=1200 if LONG else 120, stateful_step_count=50, deadline=None)
