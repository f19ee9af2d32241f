"""Machines for lockstep runs: every host and L1 granule, 40 to 52 bits of address, hardware dirty state, S2PIE."""

from lockstep import G, K, M
from rig import HD, S2PIE

GRANULES = (4 * K, 16 * K, 64 * K)
PA_BITS = (40, 48, 52)
STARTS = {  # (granule, wide): start levels, with the smallest PA size that allows each
    (4 * K, False): {2: 32, 1: 32, 0: 44},
    (4 * K, True): {2: 32, 1: 32, 0: 44, -1: 52},
    (16 * K, False): {2: 32, 1: 42},
    (16 * K, True): {2: 32, 1: 42, 0: 48},
    (64 * K, False): {2: 32, 1: 44},
    (64 * K, True): {2: 32, 1: 44},
}
LARGEST_BLOCK = {4 * K: (2 * M, G, 512 * G), 16 * K: (32 * M, 64 * G), 64 * K: (512 * M, 4096 * G)}


def random_machine(rng, host_granule, pa_bits, hafdbs, s2pie):
    """Keyword arguments of lockstep.Pair; what is not given is drawn. FEAT_S2PIE comes with FEAT_XNX."""
    wide_host, xnx = pa_bits == 52, s2pie or rng.random() < 0.3
    features = {
        "pa_bits": pa_bits,
        "hafdbs": hafdbs,
        "s2pie": s2pie,
        "lpa": wide_host,
        "lpa2": rng.random() < 0.6 if not wide_host or host_granule == 64 * K else True,
        "ttl": rng.random() < 0.8,
        "bbm": rng.random() < 0.3,
        "vmid_bits": 16,
    }
    granules = tuple(rng.choice([g for g in GRANULES if g >= host_granule]) for _ in range(2))
    shapes = tuple(random_shape(rng, granule, features) for granule in granules)
    return {
        "granules": granules,
        "host_granule": host_granule,
        "features": features,
        "shapes": shapes,
        "high": wide_host and all(shape["wide"] for shape in shapes) and rng.random() < 0.7,
        "populate": rng.choice((None, None, host_granule, *LARGEST_BLOCK[host_granule][: 3 if wide_host else -1])),
        "fwb": rng.random() < 0.6,
        "xnx": xnx,
        "ha": rng.random() < 0.9,
        "attributes": rng.choice(("architectural",) * 4 + ("kvm72",)),
        "teardown": rng.choice(("reverse-map",) * 4 + ("interval-map",)),
    }


def random_shape(rng, granule, features):
    """One of L1's tables: format, start level, number of start tables, byte order, dirty state, indirection."""
    can = features["pa_bits"] == 52 if granule == 64 * K else features["lpa2"]
    wide = can and rng.random() < 0.7
    pa_bits = features["pa_bits"]
    start = rng.choice([level for level, least in STARTS[granule, wide].items() if pa_bits >= least])
    vtcr = (HD if rng.random() < 0.9 else 0) | (S2PIE if features["s2pie"] and rng.random() < 0.7 else 0)
    least = 4 if (granule, start) == (4 * K, 2) else 0
    return {
        "wide": wide, "start": start, "concatenated": rng.randint(least, 4), "vtcr": vtcr,
        "big_endian": rng.random() < 0.3,
    }  # fmt: skip
