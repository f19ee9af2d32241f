"""Faults against the model's walk where every page of L1's is a table of every level at once.

A word there reads as a table at one level and as a leaf at another, and what lies beside a start table that fills no
granule looks like more of it. So whatever the engine takes from the wrong place gives an answer that can be told from
the right one. Addresses lie within the input size and beyond it.
"""

import os
import random

import numpy as np
import pytest

import s2shadow
import tablegen
from model import walk as model
from model.memory import Memory
from s2shadow import EXEC, HIT, L1_FAULT, MAPPED, MISS, MMIO, READ, WRITE
from seed import SEED

K, M, G = 1 << 10, 1 << 20, 1 << 30
RAM, SIZE, HOST = 1 << 32, G, 1 << 44
PAGES = 24                                                  # tables of L1's, the first 16 may be a start table
SEEDS = 20_000 if os.environ.get("S2SHADOW_LONG") == "1" else 200
ATTRIBUTES = 0x7FC
LAST = {4 * K: 511, 16 * K: 2047, 64 * K: 8191}


class Soup:
    def __init__(self, rng, number):
        self.rng = rng
        self.host_granule = rng.choice((4 * K, 4 * K, 16 * K, 64 * K))
        granules = tuple(size for size in LAST if size >= self.host_granule)
        self.granule = rng.choice(granules)
        self.feat = {"pa_bits": 48, "lpa2": rng.random() < 0.3, "hafdbs": 0, "ttst": rng.random() < 0.5,
                     "xnx": rng.random() < 0.7, "granules": granules, "host_granule": self.host_granule}
        self.columns = sorted({0, 1, 2, 3, LAST[self.granule], *(1 << bit for bit in range(13))})
        self.columns = [column for column in self.columns if column <= LAST[self.granule]]
        self.mem, self.ours = Memory(), s2shadow.GuestMemory()
        self.mem.add(RAM, SIZE)
        self.ours.add(RAM, SIZE)
        for page in range(PAGES):
            for column in self.columns:
                self.put(page, column)
        self.vm = s2shadow.NestedVM(self.ours, contexts=4, features=s2shadow.Features(**self.feat))
        block = rng.choice((self.host_granule, {4 * K: 2 * M, 16 * K: 32 * M, 64 * K: 512 * M}[self.host_granule]))
        self.vm.host.populate = s2shadow.Linear(HOST, max_block=block)
        self.vcpu = self.vm.vcpus[0]
        self.worlds = [self.registers(vmid) for vmid in (1, 2)]
        self.now = self.worlds[0]
        self.kinds = set()
        self.load(0)

    def put(self, page, column):
        """A word that leads on, to a table or to data, whatever level it is read at."""
        rng = self.rng
        plain = 0xC0 | 0x3C | 0x300 | 0x400                 # read and write, Normal, inner shareable, young
        attributes = rng.choice((plain, plain, plain, plain & ~0x80, plain & ~0x400, rng.getrandbits(11) & ATTRIBUTES))
        table, data = rng.randrange(PAGES) * self.granule, rng.randrange(SIZE >> 16) * 64 * K
        nowhere = rng.randrange(1 << 47) & -64 * K
        target = rng.choice((*[RAM + table] * 6, *[RAM + data] * 4, nowhere))
        word = target | attributes | rng.choice((3, 3, 3, 3, 1, 1, 0))
        address = RAM + page * self.granule + 8 * column
        self.mem.poke(address, word)
        self.ours.write64(address, word)

    def registers(self, vmid):
        while True:
            vtcr = tablegen.random_vtcr(self.rng, {**self.feat, "granules": (self.granule,)})
            hcr = s2shadow.HCR_VM
            cfg = model.Config(RAM | vmid << 48, vtcr, model.Features(**self.feat), hcr, False, 0)
            if cfg.fault is None and cfg.granule == self.granule:
                return RAM | vmid << 48, vtcr, hcr, cfg

    def load(self, number):
        self.now = self.worlds[number]
        vttbr, vtcr, hcr, _ = self.now
        self.vcpu.load(vttbr, vtcr, hcr=hcr)

    def address(self):
        """Along the columns; now and then beyond the input size."""
        rng, cfg = self.rng, self.now[3]
        ipa = sum(rng.choice(self.columns) << cfg.shift(level) for level in range(cfg.start_level, 4))
        dice = rng.random()
        if dice < 0.8:
            ipa &= (1 << cfg.ia_bits) - 1
        elif dice < 0.9:
            ipa = ipa & (1 << cfg.ia_bits) - 1 | 1 << rng.randint(cfg.ia_bits, 51)
        return ipa & (1 << 52) - 1

    def judge(self, ipa, access, f):
        want = model.walk(self.mem, self.now[3], ipa, access, False)
        where = f"{ipa:#x} {self.now}"
        if want.fault is not None:
            assert (f["kind"], f["fsc"]) == (L1_FAULT, want.fsc), where
        elif not RAM <= want.pa < RAM + SIZE:
            assert f["kind"] == MMIO and f["cipa"] == want.pa, where
        else:
            assert f["kind"] in (MAPPED, HIT), where
            assert (f["cipa"], f["pa"]) == (want.pa, HOST + want.pa), where
        self.kinds.add(int(f["kind"]))
        seen = self.vcpu.translate(ipa, access)
        if f["kind"] in (MAPPED, HIT):
            assert (seen.kind, seen.pa) == (HIT, f["pa"]), where
        else:
            assert seen.kind == MISS, where

    def step(self):
        rng = self.rng
        dice = rng.random()
        if dice < 0.04:
            self.load(rng.randrange(2))
        elif dice < 0.08:
            self.put(rng.randrange(PAGES), rng.choice(self.columns))
            self.vcpu.tlbi("ALLE1IS")
        elif dice < 0.1:
            start = RAM + rng.randrange(SIZE // self.host_granule) * self.host_granule
            self.vm.unmap(start, min(start + rng.choice((1, 16, 1024)) * self.host_granule, RAM + SIZE))
        else:
            access = rng.choice((READ, READ, WRITE, EXEC))
            ipas = [self.address() for _ in range(1 if dice < 0.5 else rng.randrange(2, 40))]
            if len(ipas) == 1:
                f = self.vcpu.fault(ipas[0], access)
                self.judge(ipas[0], access, {name: getattr(f, name) for name in ("kind", "fsc", "cipa", "pa")})
            else:
                got = self.vcpu.fault_many(np.array(ipas, dtype=np.uint64), access)
                for ipa, f in zip(ipas, got, strict=True):
                    self.judge(ipa, access, f)


@pytest.mark.parametrize("tenth", range(10))
def test_soup(tenth):
    kinds = set()
    for number in range(tenth, SEEDS, 10):
        soup = Soup(random.Random(f"{SEED} {number}"), number)
        for _ in range(60):
            soup.step()
        soup.vm.check()
        kinds |= soup.kinds
    assert {MAPPED, HIT, L1_FAULT, MMIO} <= kinds
