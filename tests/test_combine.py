"""s2shadow.combine: the shadow leaf for a leaf of L1 over a leaf of the host."""

import csv
import itertools
import random
from pathlib import Path

import pytest

import s2shadow
from model import combine as model
from s2shadow import EL0, EXEC, EXEC_EL0, HCR_FWB, HCR_VM, READ, WRITE, Features, HostMapping

TABLE = Path(__file__).parent / "data" / "spec" / "memattr_compose.csv"
ROWS = list(csv.DictReader(TABLE.read_text().splitlines()))
RWX = READ | WRITE | EXEC | EXEC_EL0
XN = {EXEC | EXEC_EL0: 0, EXEC_EL0: 1, 0: 2, EXEC: 3}
ALLOWED = {READ: READ, WRITE: WRITE, EXEC: EXEC, EXEC_EL0: EXEC | EL0}  # permission: an access that needs it alone
PERMS = [rw | x for rw in range(4) for x in XN if rw | x]
SHIFT = {1 << 12: (12, 9), 1 << 14: (14, 11), 1 << 16: (16, 13)}


def leaf_walk(pa, *, size=4096, perm=RWX, memattr=0xF, sh=3, granule=4096, fwb=False):
    """A Walk of a leaf with these fields: one start table holds it as a block, or a last level as a page."""
    page, stride = SHIFT[granule]
    level = 3 - (size.bit_length() - 1 - page) // stride
    sl0 = {4096: {3: 3, 2: 0, 1: 1}, 16384: {3: 0, 2: 1, 1: 2}, 65536: {3: 0, 2: 1, 1: 2}}[granule][level]
    ia = min(size.bit_length() - 1 + stride, 48)
    tg0 = {4096: 0, 65536: 1, 16384: 2}[granule]
    mem = s2shadow.GuestMemory()
    mem.add(0, 1 << 16)
    kind = 3 if level == 3 else 1
    xn = XN[perm & (EXEC | EXEC_EL0)]
    mem.write64(0, pa & -size | kind | memattr << 2 | (perm & 3) << 6 | sh << 8 | 1 << 10 | xn << 53)
    hcr = HCR_VM | (HCR_FWB if fwb else 0)
    cfg = s2shadow.Stage2Config(0, (64 - ia) | sl0 << 6 | tg0 << 14 | 5 << 16, features=Features(ttst=True), hcr=hcr)
    w = s2shadow.walk(mem, cfg, pa & (size - 1), ALLOWED[perm & -perm])
    assert (w.status, w.size, w.memattr, w.pa, cfg.error) == (0, size, memattr, pa, None)
    return w


@pytest.mark.parametrize("row", ROWS, ids=lambda r: "-".join(list(r.values())[:3] + [r["l0_memattr"]]))
def test_memattr(row):
    """Each of the 196 compositions of uniform attributes, with and without FWB on either side."""
    fwb, host_fwb = row["l1_fwb"] == "1", row["l0_fwb"] == "1"
    guest = leaf_walk(0x4000_0000, memattr=int(row["l1_memattr"], 2), fwb=fwb)
    host = HostMapping(0x8000_0000, 4096, memattr=int(row["l0_memattr"], 2))
    c = s2shadow.combine(guest, host, features=Features(), guest_fwb=fwb, host_fwb=host_fwb)
    assert c.memattr == int(row["shadow_memattr"], 2)
    assert c.desc >> 2 & 15 == c.memattr


def test_memattr_rows():
    """The table is whole."""
    assert len(ROWS) == 196


@pytest.mark.parametrize("fwb", [False, True])
@pytest.mark.parametrize("host_fwb", [False, True])
def test_every_code(fwb, host_fwb):
    """All 16 x 16 codes, mixed halves and reserved ones too, as the model combines them."""
    for guest_code, host_code in itertools.product(range(16), repeat=2):
        guest = leaf_walk(0x4000_0000, memattr=guest_code, sh=0, fwb=fwb)
        host = HostMapping(0x8000_0000, 4096, memattr=host_code)
        c = s2shadow.combine(guest, host, features=Features(), guest_fwb=fwb, host_fwb=host_fwb)
        want = model.combine_memattr(guest_code, host_code, fwb, host_fwb)
        assert (c.memattr, c.sh) == (want, model.combine_sh(0, 3, want, host_fwb)), (guest_code, host_code)


@pytest.mark.parametrize(
    ("guest", "host", "memattr", "sh"),
    [(0, 0, 15, 0), (0, 3, 15, 3), (3, 0, 15, 3), (3, 3, 15, 3), (2, 3, 15, 2), (3, 2, 15, 2), (0, 2, 15, 2)]
    + [(0, 0, 5, 2), (3, 3, 5, 2), (3, 0, 1, 2), (0, 0, 0, 2), (1, 0, 15, 0), (1, 3, 15, 3)],
)
def test_shareability(guest, host, memattr, sh):
    """Outer beats inner beats none; Device and non-cacheable are outer; the reserved value counts as none."""
    under = leaf_walk(0x8000_0000, sh=host, memattr=15)
    over = leaf_walk(0x8000_0000, sh=guest, memattr=memattr)
    c = s2shadow.combine(over, under, features=Features(), guest_fwb=False, host_fwb=False)
    assert c.sh == sh
    assert c.desc >> 8 & 3 == sh


@pytest.mark.parametrize("xnx", [True, False])
def test_permissions(xnx):
    """A subset of both; without FEAT_XNX execution only where EL1 and EL0 both may."""
    feat = Features(xnx=xnx)
    for guest_perm, host_perm in itertools.product(PERMS, repeat=2):
        guest, host = leaf_walk(0x4000_0000, perm=guest_perm), leaf_walk(0x4000_0000, perm=host_perm)
        c = s2shadow.combine(guest, host, features=feat, guest_fwb=False, host_fwb=False)
        want = guest_perm & host_perm
        if not xnx and want & 36 != 36:
            want &= 3
        assert c.perm == want
        assert (c.desc >> 6 & 3, c.desc >> 53 & 3) == (want & 3, XN[want & 36])


SIZES = {4096: (1 << 12, 1 << 21, 1 << 30), 16384: (1 << 14, 1 << 25), 65536: (1 << 16, 1 << 29)}


@pytest.mark.parametrize("host_granule", [4096, 16384, 65536])
@pytest.mark.parametrize("guest_granule", [4096, 16384, 65536])
def test_sizes(guest_granule, host_granule):
    """The largest leaf of the host's granule inside both; the PA is that of this leaf around the address."""
    if guest_granule < host_granule:
        return
    feat = Features(host_granule=host_granule)
    rng = random.Random(guest_granule + host_granule)
    for guest_size, host_size in itertools.product(SIZES[guest_granule], SIZES[host_granule]):
        cipa = rng.getrandbits(40)
        guest = leaf_walk(cipa, size=guest_size, granule=guest_granule)
        pa = 0x5_0000_0000_0000 >> 4 & -host_size
        host = HostMapping(pa, host_size)
        c = s2shadow.combine(guest, host, features=feat, guest_fwb=False, host_fwb=False)
        size = max(s for s in SIZES[host_granule] if s <= min(guest_size, host_size))
        assert c.size == size
        mask = ((1 << 48) - 1) & ~0xFFF
        assert c.desc & mask == pa | cipa & (host_size - 1) & ~(size - 1)
        assert c.desc & 3 == (3 if size == host_granule else 1)


def test_descriptor_fields():
    """Access flag set, L1's level beside it in bits 57:55, nothing anywhere else."""
    for size, level in ((1 << 12, 3), (1 << 21, 2), (1 << 30, 1)):
        guest = leaf_walk(0x4000_0000, size=size)
        c = s2shadow.combine(guest, HostMapping(0, 1 << 30), features=Features(), guest_fwb=False, host_fwb=False)
        assert c.guest_level == level
        assert c.desc == (3 if level == 3 else 1) | 15 << 2 | 3 << 6 | 3 << 8 | 1 << 10 | (level + 2) << 55


def test_stage2_off():
    """No guest leaf: the host's leaf as it is, level -2, tag 0."""
    host = HostMapping(0x4020_0000, 1 << 21, perm="rx", memattr="nc")
    c = s2shadow.combine(None, host, features=Features(), guest_fwb=False, host_fwb=True)
    assert (c.size, c.perm, c.memattr, c.guest_level) == (1 << 21, READ | EXEC | EXEC_EL0, 5, -2)
    assert c.desc & ~0x300 == 0x4020_0000 | 1 | 5 << 2 | 1 << 6 | 1 << 10


@pytest.mark.parametrize(
    ("name", "fwb", "code"),
    [("normal", True, 6), ("normal", False, 15), ("normal-as-s1", True, 7), ("normal-as-s1", False, 15)]
    + [("nc", fwb, 5) for fwb in (True, False)]
    + [(f"device-{kind}", True, n) for n, kind in enumerate(("nGnRnE", "nGnRE", "nGRE", "GRE"))],
)
def test_host_names(name, fwb, code):
    """The names of the host's attributes."""
    host = HostMapping(0, 4096, memattr=name)
    assert s2shadow.combine(None, host, features=Features(), guest_fwb=fwb, host_fwb=fwb).memattr == code


def test_kvm72_ignores_attributes():
    """As Linux 7.2: L1's attributes and shareability count for nothing; permissions and size still do."""
    for memattr, sh in itertools.product(range(16), range(4)):
        guest = leaf_walk(0x4000_0000, memattr=memattr, sh=sh, perm=READ)
        host = HostMapping(0, 1 << 21)
        c = s2shadow.combine(guest, host, features=Features(), guest_fwb=True, host_fwb=True, attributes="kvm72")
        assert (c.memattr, c.sh, c.perm, c.size) == (6, 3, READ, 4096)


def random_fields(rng):
    return {"perm": rng.choice(PERMS), "memattr": rng.randrange(16), "sh": rng.randrange(4)}


def test_against_model():
    """Random leaves on both sides, every field, as the model combines them."""
    rng = random.Random(1)
    for _ in range(2000):
        xnx, fwb, host_fwb = (rng.random() < 0.5 for _ in range(3))
        attributes = rng.choice(("architectural", "architectural", "kvm72"))
        host_granule = rng.choice((4096, 4096, 16384, 65536))
        granule = rng.choice([g for g in SIZES if g >= host_granule])
        feat = Features(xnx=xnx, host_granule=host_granule)
        cipa, g, h = rng.getrandbits(42), random_fields(rng), random_fields(rng)
        guest_size, host_size = rng.choice(SIZES[granule]), rng.choice(SIZES[host_granule])
        guest = leaf_walk(cipa, size=guest_size, granule=granule, fwb=fwb, **g)
        pa = rng.getrandbits(47) & -host_size
        host = leaf_walk(pa | cipa & (host_size - 1), size=host_size, granule=host_granule, **h)
        got = s2shadow.combine(guest, host, features=feat, guest_fwb=fwb, host_fwb=host_fwb, attributes=attributes)
        want = model.combine(guest, model.Host(pa, host_size, **h), feat, fwb, host_fwb, attributes)
        for name in ("desc", "size", "perm", "memattr", "sh", "guest_level"):
            assert getattr(got, name) == getattr(want, name), (name, got, want)


@pytest.mark.parametrize("side", ["guest", "host"])
def test_faulted_walk(side):
    """A walk that found no leaf cannot be combined."""
    mem = s2shadow.GuestMemory()
    mem.add(0, 4096)
    cfg = s2shadow.Stage2Config(0, 25 | 1 << 6 | 5 << 16)
    fault, leaf = s2shadow.walk(mem, cfg, 0), leaf_walk(0x4000_0000)
    assert fault.status == 1
    args = (fault, leaf) if side == "guest" else (leaf, fault)
    with pytest.raises(ValueError, match=side):
        s2shadow.combine(*args, features=Features(), guest_fwb=False, host_fwb=False)


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ({"pa": 0x1000, "size": 1 << 21}, "pa"),
        ({"pa": 0x800, "size": 4096}, "pa"),
        ({"pa": -4096, "size": 4096}, "pa"),
        ({"pa": 0, "size": 0}, "size"),
        ({"pa": 0, "size": 12288}, "size"),
        ({"pa": 0, "size": 4096, "perm": "rwz"}, "perm"),
        ({"pa": 0, "size": 4096, "memattr": "cached"}, "memattr"),
        ({"pa": 0, "size": 4096, "memattr": 16}, "memattr"),
    ],
)
def test_host_mapping_refused(args, name):
    """A host mapping that no leaf could be: an error that names the argument."""
    with pytest.raises((ValueError, TypeError), match=name):
        HostMapping(**args)


def test_unknown_attributes_policy():
    """A policy that does not exist."""
    with pytest.raises(ValueError, match="attributes"):
        s2shadow.combine(
            None, HostMapping(0, 4096), features=Features(), guest_fwb=True, host_fwb=True, attributes="strictest"
        )
