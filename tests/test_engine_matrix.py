"""Engine against model on every kind of machine: host granule, PA size, formats of L1, dirty state, indirection."""

import itertools
import os
import random
from collections import Counter

import pytest

import machines
import randomops
from rig import DIRTY, K
from s2shadow import HIT, HOST_FAULT, L1_FAULT, MAPPED, MMIO
from tlbistep import TLBIS, TlbiPair

SEEDS = range(50 if os.environ.get("S2SHADOW_LONG") == "1" else 1)
COUNT = 800
MIX = {**randomops.MORE, **{operation: weight // 6 for operation, weight in TLBIS.items()}}


class Observed(TlbiPair):
    """Counts what happened, so that a run in which nothing did is seen."""

    def __init__(self, **options):
        self.counted = Counter()
        super().__init__(**options)

    def same_fault(self, got, want):
        super().same_fault(got, want)
        self.counted[want.kind] += 1
        self.counted["mmu writes"] += want.kind == MMIO and self.theirs.region(want.cipa) == self.theirs.region(
            self.data
        )
        self.counted["dirty"] += any(self.is_dirty(address, word) for address, word in self.theirs.writes)
        self.counted["huge"] += want.size >= 64 << 30

    def is_dirty(self, address, word):
        """Whether a hardware update set bit 7: L1's own writes leave it clear where the bit is hardware's to set."""
        tables = self.tables[address >= self.ram + (256 << 20)]
        return bool(tables.swap(word) & DIRTY) and tables.vtcr >> 22 & 1


def run(*machine, seed):
    rng = random.Random(f"{machine} {seed}")
    pair = Observed(vcpus=2, contexts=5, **machines.random_machine(rng, *machine))
    randomops.prefill(rng, pair)
    pair.check()

    def after(n, name):
        if n % 250 == 0:
            pair.check()

    randomops.run(rng, pair, COUNT, after, MIX)
    pair.check()
    pair.check_hardware()
    return pair.counted


@pytest.mark.parametrize("pa_bits", machines.PA_BITS)
@pytest.mark.parametrize("host_granule", machines.GRANULES, ids=lambda size: f"{size // K}K")
def test_machines(host_granule, pa_bits):
    """Without the access flag, with it, and with dirty state: the same answers, shadows, tables, owed maintenance."""
    seen = Counter()
    for seed in SEEDS:
        for hafdbs, s2pie in itertools.product((0, 1, 2), (False, True)):
            seen += run(host_granule, pa_bits, hafdbs, s2pie, seed=seed)
    assert min(seen[kind] for kind in (HIT, MAPPED, L1_FAULT, HOST_FAULT, MMIO, "dirty", "mmu writes")) > 0, seen
    assert pa_bits < 52 or seen["huge"] > 0
