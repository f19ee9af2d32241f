"""An L1 that means harm: its tables loop, point anywhere, or are noise. It gets faults and nothing else."""

import numpy as np
import pytest

import s2shadow
from rig import DATA, DEVICE, HOST, NOWHERE, PAGE, RAM, ROM, K, M, Rig
from s2shadow import HIT, L1_FAULT, MAPPED, MMIO, READ, WRITE

ALLOWED = {HIT, MAPPED, L1_FAULT, MMIO, s2shadow.HOST_FAULT}


@pytest.mark.parametrize("granule", [4 * K, 16 * K, 64 * K])
def test_table_points_to_itself(granule):
    """Every entry of the root is the root: the walk ends at level 3 and reads the root as pages."""
    r = Rig(granule=granule)
    for n in range(granule // 8):
        r.tables.set(r.tables.base + 8 * n, r.tables.base | 0x7FF)
    for ipa in (0, PAGE, 12345 * PAGE, (1 << r.tables.ia_bits) - 1):
        f = r.fault(ipa)
        assert f.kind in (MAPPED, HIT)
        assert f.cipa & -granule == r.tables.base
    r.vm.check()


@pytest.mark.parametrize("target", [NOWHERE, DEVICE, ROM, (1 << 48) - PAGE, 0, RAM + 64 * M - PAGE])
def test_table_points_away(target):
    """Tables outside memory, in devices, in ROM, at the edge: an external abort, or a walk of what is there."""
    r = Rig()
    r.tables.set(r.tables.slot(0, 1), target | 3)
    r.tables.set(r.tables.slot(1 << 30, 1), r.tables.new_table() | 3)
    r.tables.set(r.tables.slot(1 << 30, 2), target | 3)
    for ipa, level in ((5 * PAGE, 2), ((1 << 30) + 5 * PAGE, 3)):
        f = r.fault(ipa)
        readable = target in (ROM, RAM + 64 * M - PAGE)
        assert (f.kind, f.fsc) == (L1_FAULT, (0x04 if readable else 0x14) + level)
    r.vm.check()


def test_maps_its_own_tables():
    """L1 maps its tables for L2, which rewrites them: the shadow is a cache, and check() still holds."""
    r = Rig()
    r.tables.map_range(0, RAM, 2 * M)
    slot = r.tables.slot(0, 3)
    assert r.fault(slot - RAM, WRITE).kind == MAPPED
    r.tables.set(slot, r.tables.leaf(DATA, 3))
    r.vcpu.tlbi("VMALLS12E1IS")
    assert r.fault(0).cipa == DATA
    r.vm.check()


@pytest.mark.parametrize("seed", range(6))
def test_noise(seed):
    """All of L1's table memory is noise, under every granule, with and without hardware updates."""
    rng = np.random.default_rng(seed)
    r = Rig(granule=[4 * K, 16 * K, 64 * K][seed % 3], vtcr=(seed % 2) << 21)
    noise = rng.integers(0, 1 << 63, 2 * M // 8, dtype=np.uint64) * 2 + rng.integers(0, 2, 2 * M // 8, dtype=np.uint64)
    noise[::3] = noise[::3] & np.uint64(0x1F_F000) | np.uint64(RAM | 0x7FF)  # many point back into the noise
    r.mem.write(RAM, noise.tobytes())
    kinds = set()
    for _ in range(20):
        ipas = rng.integers(0, 1 << r.tables.ia_bits, 500, dtype=np.uint64)
        got = r.vcpu.fault_many(ipas, rng.choice([READ, WRITE, s2shadow.EXEC], 500).astype(np.uint8))
        kinds |= set(got["kind"].tolist())
        inside = np.isin(got["kind"], [HIT, MAPPED])
        assert ((got["pa"][inside] >= HOST + RAM) & (got["pa"][inside] < HOST + RAM + 64 * M)).all()
        r.vcpu.tlbi("IPAS2E1IS", int(rng.integers(0, 1 << 36)))
        r.vm.check()
    assert kinds <= ALLOWED and {L1_FAULT, MAPPED} <= kinds


@pytest.mark.parametrize("seed", range(4))
def test_random_registers(seed):
    """Noise in the registers and in the tables: load, fault, invalidate, never an exception."""
    rng = np.random.default_rng(seed + 100)
    r = Rig(features=s2shadow.Features(s2pie=seed % 2 == 1), contexts=4)
    r.mem.write(RAM, rng.bytes(2 * M))
    for _ in range(300):
        vttbr, vtcr, hcr, s2pir = (int(x) for x in rng.integers(0, 1 << 64, 4, dtype=np.uint64))
        if rng.random() < 0.7:
            vttbr = RAM | vttbr & 0xFFFF_0000_0010_F000
        r.vcpu.load(vttbr | 1, vtcr & ~0x3F | int(rng.integers(16, 48)), hcr=hcr | 1, big_endian=bool(rng.integers(2)),
                    s2pir=s2pir)
        ipas = rng.integers(0, 1 << 48, 8, dtype=np.uint64) >> rng.integers(0, 36, dtype=np.uint64)
        got = r.vcpu.fault_many(ipas, WRITE)
        assert set(got["kind"].tolist()) <= ALLOWED
        r.vcpu.tlbi("IPAS2E1IS", int(rng.integers(0, 1 << 36)), vttbr=vttbr, vtcr=vtcr, hcr=hcr)
    r.vm.check()


def test_thousand_aliases():
    """One page under 32,768 nested addresses: one unmap takes exactly those."""
    r = Rig()
    r.tables.next = RAM + 2 * M
    for n in range(32768):
        r.tables.map(n * PAGE, RAM + 32 * M)
    r.tables.map(32768 * PAGE, RAM + 33 * M)
    got = r.vcpu.fault_many(np.arange(32769, dtype=np.uint64) * PAGE, READ)
    assert (got["kind"] == MAPPED).all()
    again = r.vcpu.fault_many(np.arange(32769, dtype=np.uint64) * PAGE, READ)
    assert (again["kind"] == HIT).all() and np.array_equal(again["pa"], got["pa"])
    assert len(r.vm.reverse(RAM + 32 * M)) == 32768
    assert r.vm.unmap(RAM + 32 * M, RAM + 32 * M + PAGE).leaves == 32768
    assert r.leaves() == [(32768 * PAGE, RAM + 33 * M, PAGE)]
    r.vm.check()


def test_rewrite_without_tlbi():
    """L1 never invalidates: whatever it sees is a translation of its own, old or new, and the host's address for it."""
    rng = np.random.default_rng(5)
    r = Rig()
    history = {n: set() for n in range(16)}
    for _ in range(400):
        n = int(rng.integers(16))
        page = DATA + int(rng.integers(64)) * PAGE
        r.tables.map(n * PAGE, page, perm=str(rng.choice(["r", "rw", "rx"])))
        history[n].add(page)
        f = r.fault(n * PAGE, int(rng.choice([READ, WRITE])))
        assert f.kind in (HIT, MAPPED, L1_FAULT)
        if f.kind != L1_FAULT:
            assert f.cipa in history[n] and f.pa == HOST + f.cipa
    r.vm.check()
