"""s2shadow.walk against the reference model: random registers, random tables with junk in them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import s2shadow
import tablegen
from model import walk as model
from model.memory import Memory

FIELDS = s2shadow.WALK_DTYPE.names
SEEDED = st.randoms(use_true_random=True)


class Twins:
    """The same registers and tables for the model and for the engine."""

    def __init__(self, rng):
        feat = tablegen.random_features(rng)
        vttbr, vtcr, hcr, s2pir = tablegen.random_registers(rng, feat)
        swap = rng.random() < 0.3
        self.cfg = model.Config(vttbr, vtcr, model.Features(**feat), hcr, swap, s2pir)
        self.theirs = s2shadow.Stage2Config(vttbr, vtcr, s2shadow.Features(**feat), hcr, swap, s2pir)
        self.mem, self.ours = Memory(), s2shadow.GuestMemory()
        self.read_only = bytearray(tablegen.SMALL)
        for start, size, kind in tablegen.REGIONS:
            self.mem.add(start, size, **kind)
            if "readonly" in kind:
                self.ours.add(start, buffer=self.read_only, readonly=True)
            else:
                self.ours.add(start, size, **kind)

    def copy_tables(self):
        for address, word in self.mem.words.items():
            if self.mem.region(address)[2] == "read-only":
                at = address - tablegen.READ_ONLY
                self.read_only[at : at + 8] = word.to_bytes(8, "little")
            else:
                self.ours.write64(address, word)

    def check_tables(self):
        assert all(self.ours.read64(address) == word for address, word in self.mem.words.items())

    def check_walk(self, ipa, access, update, trace=False):
        want = model.walk(self.mem, self.cfg, ipa, access, update)
        got = s2shadow.walk(self.ours, self.theirs, ipa, access, update, trace=trace)
        assert {name: int(getattr(got, name)) for name in FIELDS} == as_dict(want)
        assert got.fault == want.text
        steps = tuple(tuple(getattr(step, name) for name in model.Step._fields) for step in got.steps)
        assert steps == (want.steps if trace else ())
        return want

    def check_steps(self, ipa, access, update):
        """The same walk over the model's memory, word by word."""
        words, saved = dict(self.mem.words), dict(self.mem.words)
        want = model.walk(self.mem, self.cfg, ipa, access, update)
        step = s2shadow.walk_step(self.theirs, ipa, access, update)
        while (request := step.request) is not None:
            region = self.mem.region(request.address)
            if region is None or region[2] == "device" or (region[2] and request.kind == "swap"):
                step.abort()
                continue
            word = words.get(request.address, 0)
            if request.kind == "swap":
                assert request.expected == word
                words[request.address] = request.desired
            step.feed(word)
        assert {name: int(getattr(step.result, name)) for name in FIELDS} == as_dict(want)
        assert words == self.mem.words
        self.mem.words = saved


def as_dict(w):
    """A model walk under the engine's field names."""
    return {"status": int(w.fault is not None), **{name: getattr(w, name) for name in FIELDS if name != "status"}}


@given(SEEDED)
@settings(max_examples=1500)
def test_walk(rng):
    """Field by field, and the tables afterwards, one address after another, without and with updates."""
    twins = Twins(rng)
    ipas = [tablegen.random_address(rng, max(twins.cfg.ia_bits, 1)) for _ in range(6)]
    accesses = [tablegen.random_access(rng) for _ in ipas]
    for ipa in ipas:
        tablegen.grow(rng, twins.mem, twins.cfg, ipa)
    twins.copy_tables()
    found = [
        twins.check_walk(ipa, access, update=False, trace=True) for ipa, access in zip(ipas, accesses, strict=True)
    ]
    twins.check_tables()
    batch = s2shadow.walk_many(
        twins.ours, twins.theirs, np.array(ipas, dtype=np.uint64), np.array(accesses, dtype=np.uint8), update=False
    )
    assert [{n: row[n].item() for n in FIELDS} for row in batch] == [as_dict(w) for w in found]
    for n, (ipa, access) in enumerate(zip(ipas, accesses, strict=True)):
        twins.check_steps(ipa, access, update=False)
        twins.check_steps(ipa, access, update=True)
        twins.check_walk(ipa, access, update=True, trace=n % 2 == 1)
        twins.check_tables()


@given(SEEDED)
@settings(max_examples=200)
def test_batch_updates(rng):
    """A batch with updates leaves the tables as its walks one by one would."""
    twins = Twins(rng)
    ipas = [tablegen.random_address(rng, max(twins.cfg.ia_bits, 1)) for _ in range(40)]
    for ipa in ipas:
        tablegen.grow(rng, twins.mem, twins.cfg, ipa)
    twins.copy_tables()
    for ipa in ipas:
        model.walk(twins.mem, twins.cfg, ipa, model.WRITE)
    s2shadow.walk_many(twins.ours, twins.theirs, np.array(ipas, dtype=np.uint64), s2shadow.WRITE)
    twins.check_tables()


@given(SEEDED)
@settings(max_examples=1000)
def test_config(rng):
    """What the registers decode to, legal or not."""
    twins = Twins(rng)
    cfg, theirs = twins.cfg, twins.theirs
    text = f"{model.FAULT_TEXT[cfg.fault[0]]}, level {cfg.fault[1]}" if cfg.fault else None
    assert theirs.error == text
    assert (theirs.granule, theirs.vmid, theirs.enabled) == (cfg.granule, cfg.vmid, cfg.enabled)
    if cfg.enabled and cfg.fault is None:
        assert (theirs.start_level, theirs.concatenated) == (cfg.start_level, cfg.tables)
        assert (theirs.baddr, theirs.ia_bits) == (cfg.base, cfg.ia_bits)
        assert min(theirs.oa_bits, 48) == min(cfg.oa_bits, 48)


@given(SEEDED)
@settings(max_examples=200)
def test_leaves(rng):
    """All that a walk could find, and nothing else."""
    twins = Twins(rng)
    for _ in range(6):
        tablegen.grow(rng, twins.mem, twins.cfg, tablegen.random_address(rng, max(twins.cfg.ia_bits, 1)))
    twins.copy_tables()
    assert s2shadow.leaves(twins.ours, twins.theirs).tolist() == model.leaves(twins.mem, twins.cfg)


def test_leaves_not_to_be_cached():
    """A block with nT faults under FEAT_BBM, so it is no leaf; without the feature the bit means nothing."""
    mem = s2shadow.GuestMemory()
    mem.add(tablegen.RAM, tablegen.POOL)
    mem.write64(tablegen.RAM, 0x8000_0000 | 1 << 16 | 0x7FD)
    for bbm in (False, True):
        feat = s2shadow.Features(bbm=bbm)
        cfg = s2shadow.Stage2Config(tablegen.RAM, 30 | 5 << 16, feat)
        assert len(s2shadow.leaves(mem, cfg)) == 1 - bbm == 1 - s2shadow.walk(mem, cfg, 0).status
