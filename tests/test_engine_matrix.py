"""Engine against model on every kind of machine: host granule, PA size, formats of L1, dirty state, indirection."""

import os
import random

import pytest

import machines
import randomops
from tlbistep import TLBIS, TlbiPair

LONG = 40 if os.environ.get("S2SHADOW_LONG") == "1" else 1
MIX = {**randomops.WEIGHTS, **randomops.MORE, **TLBIS}


def run(seed, corner, count):
    rng = random.Random(f"{corner} {seed}")
    pair = TlbiPair(vcpus=2, contexts=5, **machines.random_machine(rng, *corner))
    randomops.prefill(rng, pair)
    pair.check()

    def after(n, name):
        if n % 100 == 0:
            pair.check()

    randomops.run(rng, pair, count, after, MIX)
    pair.check()


@pytest.mark.parametrize("corner", machines.CORNERS, ids=lambda c: f"{c[0] >> 10}K-pa{c[1]}-hafdbs{c[2]}")
def test_corner(corner):
    for seed in range(LONG):
        run(seed, corner, 600)
