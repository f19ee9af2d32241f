"""Random registers and random small tables with junk in them, for engine and model alike."""

from model import walk as model
from model.memory import swap64

RAM, READ_ONLY, DEVICE, HIGH = 0x4000_0000, 0x5000_0000, 0x6000_0000, 0xA_0000_0000_0000
POOL, SMALL = 0x10_0000, 0x1_0000
REGIONS = (
    (RAM, POOL, {}),
    (READ_ONLY, SMALL, {"readonly": True}),
    (DEVICE, SMALL, {"device": True}),
    (HIGH, POOL, {}),
)
SL0 = {4096: {3: 3, 2: 0, 1: 1, 0: 2, -1: 0}, 16384: {3: 0, 2: 1, 1: 2, 0: 3}, 65536: {3: 0, 2: 1, 1: 2}}
TG0 = {4096: 0, 65536: 1, 16384: 2}


def random_features(rng):
    """Keyword arguments of Features."""
    wide = rng.random() < 0.5
    lpa2 = wide and rng.random() < 0.6
    s2pie = rng.random() < 0.4
    return {
        "pa_bits": 52 if wide else rng.choice((32, 36, 40, 42, 44, 48, 48, 48)),
        "lpa": wide,
        "lpa2": lpa2,
        "granules": rng.choice(((4096, 16384, 65536),) * 6 + ((4096,), (16384, 65536), (65536,), (4096, 65536))),
        "xnx": s2pie or rng.random() < 0.6,
        "fwb": rng.random() < 0.7,
        "ttst": rng.random() < 0.7,
        "hafdbs": rng.choice((0, 1, 2, 2)),
        "s2pie": s2pie,
        "vmid_bits": rng.choice((8, 16)),
        "bbm": rng.random() < 0.3,
    }


def random_vtcr(rng, feat):
    """Most often a start level and a size that go together."""
    granule = rng.choice(feat["granules"])
    ds = int(feat["lpa2"] and granule != 65536 and rng.random() < 0.7)
    page = granule.bit_length() - 1
    start = rng.choice([level for level in SL0[granule] if ds or level >= (1 if granule == 16384 else 0)])
    shift = page + (page - 3) * (3 - start)
    largest = min(52 if ds or granule == 65536 else 48, feat["pa_bits"], shift + page + 1)
    ia = rng.randint(min(shift + 1, largest), largest)
    vtcr = (
        (64 - ia) | SL0[granule][start] << 6 | TG0[granule] << 14 | rng.choice((0, 1, 2, 5, 5, 5, 6, 6, 6, 6, 7)) << 16
    )
    vtcr |= (rng.random() < 0.6) << 36
    vtcr |= rng.getrandbits(6) << 8 | rng.getrandbits(4) << 19 | ds << 32 | (start == -1) << 33
    return vtcr ^ (rng.getrandbits(36) & 0x3_0078_FFFF if rng.random() < 0.15 else 0)


def random_registers(rng, feat):
    """VTTBR, VTCR, HCR and S2PIR."""
    place = rng.choice((RAM,) * 12 + (READ_ONLY, DEVICE, 0, HIGH))
    base = place + (rng.randrange(POOL // 2) & ~0x3F if rng.random() < 0.5 else 0)
    vttbr = base & ((1 << 48) - 1) | (base >> 48) << 2 | rng.getrandbits(16) << 48 | rng.getrandbits(1)
    hcr = rng.choice((1, 1, 1, 1, 1, 1 << 12, 0)) | rng.choice((0, model.FWB)) | rng.choice((0, model.HCR_PTW))
    return vttbr, random_vtcr(rng, feat), hcr, rng.choice((0xFEDC_BA98_7654_3210, rng.getrandbits(64)))


def random_address(rng, bits):
    if rng.random() < 0.05:
        return rng.getrandbits(64)
    return rng.getrandbits(bits) if rng.random() < 0.6 else rng.getrandbits(rng.randint(1, bits))


def random_access(rng):
    return rng.choice((1, 1, 2, 2, 3, 4, 4, 5, 7)) | rng.choice((0, 0, 8, 16, 24))


def put_address(cfg, address):
    """The address in the bits that this descriptor format has for it."""
    low = address & ((1 << 48) - 1) & ~(cfg.granule - 1)
    if cfg.ds:
        return low | (address >> 48 & 3) << 48 | (address >> 50 & 3) << 8
    return low | (address >> 48 & 15) << 12 if cfg.granule == 65536 and cfg.features.lpa else low


def random_leaf(rng, cfg, level):
    """Most are young, some contiguous, some with bits that a careful L1 would not set."""
    address = rng.getrandbits(rng.choice((31, 36, 44, 48, 52, *[cfg.oa_bits] * 8)))
    flags = rng.getrandbits(64) & 0xFFF8_0000_0000_03FC
    flags |= 0 if rng.random() < 0.25 else 0x400
    flags &= ~(1 << 52) if rng.random() < 0.7 else -1
    if rng.random() < 0.6:
        flags |= 0xC0
    if cfg.ds:
        flags &= ~0x300
    noise = rng.getrandbits(64) & 0x0007_0000_0001_F000 if rng.random() < 0.1 else 0
    return put_address(cfg, address) | flags | noise | (3 if level == 3 else 1)


def random_descriptor(rng, cfg, level):
    """A table, a leaf, or junk."""
    dice = rng.random()
    if dice < 0.06:
        return rng.getrandbits(64)
    if dice < 0.1:
        return rng.getrandbits(64) & ~1
    if level == 3 or rng.random() < 0.2:
        return random_leaf(rng, cfg, level)
    high = (HIGH,) * 30 if cfg.oa_bits == 52 else (HIGH,)
    where = rng.choice((RAM,) * 50 + high + (READ_ONLY, READ_ONLY, DEVICE, 0x7000_0000))
    noise = rng.getrandbits(64) & 0xFFF8_0000_0000_00FC if rng.random() < 0.2 else 0
    return put_address(cfg, where + rng.randrange(POOL)) | noise | 3


def grow(rng, mem, cfg, ipa):
    """Writes descriptors along the way that this address takes, where there are none yet."""
    if not cfg.enabled or cfg.fault or ipa >> cfg.ia_bits:
        return
    table, level, top = cfg.base, cfg.start_level, cfg.ia_bits
    while True:
        addr = table + 8 * ((ipa & ((1 << top) - 1)) >> cfg.shift(level))
        if mem.read(addr) is None:
            return
        if addr not in mem.words:
            desc = random_descriptor(rng, cfg, level)
            mem.poke(addr, swap64(desc) if cfg.big_endian else desc)
        desc = swap64(mem.words[addr]) if cfg.big_endian else mem.words[addr]
        if level == 3 or desc & 3 != 3:
            return
        table, top, level = cfg.address(desc), cfg.shift(level), level + 1
