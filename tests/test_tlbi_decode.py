"""decode_tlbi: all 126 operations, all range vectors, every operand form, and words that are no operation."""

import csv

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import s2shadow
from model import tlbi as model
from model import walk
from model.tlbi import OPERATIONS, K
from s2shadow import Features, UndefinedInstruction, decode_tlbi

RANGE_VECTORS = list(csv.DictReader((model.TABLE.parent / "tlbi_range_vectors.csv").read_text().splitlines()))
OPS = [pytest.param(op, id=op.name) for op in OPERATIONS.values()]
ALL_ONES = (1 << 64) - 1
T0SZ = {48: 16, 52: 12, 40: 24}
DS = 1 << 32
MACHINES = {  # features of the engine, the same for the model
    name: (Features(**options), walk.Features(**options))
    for name, options in {
        "plain": {},
        "lpa2": {"lpa2": True},
        "lpa": {"lpa": True, "pa_bits": 52},
        "both": {"lpa": True, "lpa2": True, "pa_bits": 52},
        "no-ttl": {"ttl": False},
    }.items()
}
WITH_ASID = {"VAE1", "VALE1", "ASIDE1", "RVAE1", "RVALE1", "VAE2", "VALE2", "RVAE2", "RVALE2"}


def stem(name):
    return name.removesuffix("NXS").removesuffix("IS").removesuffix("OS")


def test_tables():
    """What the tests below go through is the whole of both tables."""
    assert len(OPERATIONS) == 126 and len(RANGE_VECTORS) == 428
    assert len({op.encoding for op in OPERATIONS.values()}) == 126


# Operations


@pytest.mark.parametrize("op", OPS)
def test_operation(op):
    """By name in either case, by fields, and by word with several registers: the row of the table."""
    spelled = [op.name, op.name.lower(), op.encoding, *(op.word | rt for rt in (0, 1, 17, 30, 31)), np.uint32(op.word)]
    for how in spelled:
        got = decode_tlbi(how, 0x1234_4000_0000_5678)
        assert (got.name, got.regime, got.scope) == (op.name, op.regime, op.scope)
        assert (got.last_level, got.shareability, got.nxs) == (op.last_level, op.shareability, op.nxs)
        assert got.takes_operand == op.takes_operand
        assert got.asid == (0x1234 if stem(op.name) in WITH_ASID else None)
        assert (got.start is not None) == (op.scope in ("VA", "VAA", "IPA"))


@pytest.mark.parametrize("op", OPS)
def test_needs(op):
    """Without one of the features that the row names it is undefined, and the message says which; else it is not."""
    for option, feature in (("tlbios", "FEAT_TLBIOS"), ("range", "FEAT_TLBIRANGE"), ("xs", "FEAT_XS")):
        without = Features(**{option: False})
        if feature not in op.needs:
            assert decode_tlbi(op.name, features=without).name == op.name
            continue
        for how in (op.name, op.encoding, op.word):
            with pytest.raises(UndefinedInstruction, match=feature):
                decode_tlbi(how, features=without)


def sysl(op1, crn, crm, op2):
    return 0xD508_001F | op1 << 16 | crn << 12 | crm << 8 | op2 << 5


EL3 = [(6, crn, crm, op2) for crn in (8, 9) for crm in (1, 3, 7) for op2 in (0, 1, 5)]
EL3_RANGE = [(6, crn, crm, op2) for crn in (8, 9) for crm in (2, 5, 6) for op2 in (1, 5)]
RME = {"PAALL": (6, 8, 7, 4), "PAALLOS": (6, 8, 1, 4), "RPAOS": (6, 8, 4, 3), "RPALOS": (6, 8, 4, 7)}
TLBIW = {
    f"VMALLWS2E1{share}{nxs}": (4, crn, crm, 2)
    for crn, nxs in ((8, ""), (9, "NXS"))
    for share, crm in (("", 6), ("IS", 2), ("OS", 5))
}
EL3_NAMES = ["ALLE3", "ALLE3IS", "ALLE3OSNXS", "VAE3", "VALE3IS", "RVAE3OS", "RVALE3"]


@pytest.mark.parametrize(
    ("how", "why"),
    [(encoding, "EL3") for encoding in EL3 + EL3_RANGE]
    + [(name, "EL3") for name in EL3_NAMES]
    + [(encoding, "RME") for encoding in RME.values()]
    + [(name, "RME") for name in RME]
    + [(encoding, "TLBIW") for encoding in TLBIW.values()]
    + [(name, "TLBIW") for name in TLBIW]
    + [("TLBIP VAE1IS", "D128")],
    ids=str,
)
def test_refused(how, why):
    """What exists in the architecture but not here is refused by name: by name, by fields and by word."""
    spelled = [how] if isinstance(how, str) else [how, sysl(*how)]
    for one in spelled:
        with pytest.raises(UndefinedInstruction, match=why):
            decode_tlbi(one)


def test_refused_128_bit():
    """SYSP with the fields of a TLBI is a TLBIP."""
    for op in OPERATIONS.values():
        with pytest.raises(UndefinedInstruction, match="D128"):
            decode_tlbi(op.word | 1 << 22)


NAMES = ["", "TLBI", "VAE1XS", "VAE1ISNXSNXS", "IPAS2"]
FIELDS = [(0, 8, 7, 4), (4, 10, 0, 1), (7, 8, 7, 0), (-4, 8, 0, 1), (1 << 70, 8, 0, 1)]
WORDS = [0, -1, 1 << 32, 0xD503_201F]


@pytest.mark.parametrize("how", [*NAMES, *FIELDS, *WORDS])
def test_no_operation(how):
    """What is nothing at all."""
    with pytest.raises(UndefinedInstruction):
        decode_tlbi(how)


@pytest.mark.parametrize("how", [None, 1.5, b"VAE1", [4, 8, 0, 1], (4, 8, 0), (4, 8, 0, "1")])
def test_wrong_types(how):
    """The message names the argument."""
    with pytest.raises(TypeError, match="op"):
        decode_tlbi(how)


def test_wrong_operands():
    """An operand or dialect that cannot be."""
    for xt in (-1, 1 << 64):
        with pytest.raises(ValueError, match="xt"):
            decode_tlbi("VAE1", xt)
    with pytest.raises(TypeError, match="xt"):
        decode_tlbi("VAE1", 0.5)
    with pytest.raises(ValueError, match="vtcr"):
        decode_tlbi("VAE1", 0, vtcr=-1)
    with pytest.raises(ValueError, match="dialect"):
        decode_tlbi("VAE1", 0, dialect="kvm")


# Operands


@pytest.mark.parametrize("op", ["RIPAS2E1IS", "RIPAS2LE1"])
def test_range_vectors(op):
    """Both columns of every row of the table, and the hint."""
    differ = 0
    for row in RANGE_VECTORS:
        ia = int(row["ia_bits"])
        vtcr = T0SZ[ia] | (DS if row["ds"] == "1" else 0)
        feat = Features(lpa2=True, lpa=ia == 52, pa_bits=ia)
        xt = int(row["operand"], 16)
        for dialect, column in (("exact", "arch"), ("kvm72", "kvm")):
            want = tuple(int(row[f"{column}_{end}"], 16) if row[f"{column}_{end}"] else None for end in ("base", "end"))
            got = decode_tlbi(op, xt, features=feat, vtcr=vtcr, dialect=dialect)
            assert (got.start, got.end) == want, (row, dialect)
            if dialect == "exact" and got.start is not None:
                assert got.granule == {1: 4 * K, 2: 16 * K, 3: 64 * K}[int(row["tg"])]
                assert got.level == (int(row["ttl"]) or None)
        differ += row["arch_base"] != row["kvm_base"]
    assert differ > 100


def test_range_vectors_default():
    """Without VTCR: no DS, 48 bits."""
    plain = [row for row in RANGE_VECTORS if (row["ds"], row["ia_bits"]) == ("0", "48")]
    assert len(plain) > 100
    for row in plain:
        got = decode_tlbi("RIPAS2E1", int(row["operand"], 16))
        assert [f"{end:#x}" if end is not None else "" for end in (got.start, got.end)] == [
            row["arch_base"], row["arch_end"],
        ]  # fmt: skip


def same(got, want):
    """An answer of the engine and one of the model."""
    if want is None:
        assert (got.start, got.end) == (None, None)
    else:
        assert (got.start, got.end, got.granule, got.level) == (want.start, want.end, want.granule, want.level)


@pytest.mark.parametrize("machine", MACHINES)
def test_single_hints(machine):
    """All 16 TTLs of operations by IPA and by VA: a hint only where the granule has a leaf of that level."""
    ours, theirs = MACHINES[machine]
    hints = set()
    for ttl in range(16):
        got = decode_tlbi("IPAS2E1IS", ttl << 44 | 0x12345, features=ours)
        same(got, model.single_ipa(theirs, ttl << 44 | 0x12345))
        hints.add((got.granule, got.level))
        for op in ("VAE1", "VALE1OS", "VAAE1IS", "VAE2"):
            same(decode_tlbi(op, ttl << 44 | 0x12345, features=ours), model.single_va(theirs, ttl << 44 | 0x12345))
    count = {"plain": 7, "lpa2": 9, "lpa": 8, "both": 10, "no-ttl": 0}[machine]
    assert len(hints - {(None, None)}) == count


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("ds", [0, DS])
def test_range_fields(machine, ds):
    """Every TG, SCALE and TTL, with several NUM and bases, under each input size."""
    ours, theirs = MACHINES[machine]
    op = OPERATIONS["RIPAS2E1IS"]
    for fields in range(1 << 9):  # TG, SCALE, 3 of NUM, TTL
        for base in (0, 1, 0x12345, 1 << 31, (1 << 36) - 1, (1 << 37) - 1):
            xt = (fields >> 7) << 46 | (fields >> 5 & 3) << 44 | (fields >> 2 & 7) * 4 << 39 | (fields & 3) << 37 | base
            for ia in (48, 40, 52):
                vtcr = T0SZ[ia] | ds
                got = decode_tlbi(op.name, xt, features=ours, vtcr=vtcr)
                same(got, model.named_exactly(op, xt, theirs, vtcr))


def test_range_size():
    """pages = (NUM+1) << (5*SCALE+1): from 2 pages to 2^21 of each granule."""
    for tg, granule in ((1, 4 * K), (2, 16 * K), (3, 64 * K)):
        small, large = tg << 46, tg << 46 | 3 << 44 | 31 << 39
        assert [decode_tlbi("RVAE1", xt).end for xt in (small, large)] == [2 * granule, granule << 21]


def test_ipa_bits():
    """Bits above the size of an IPA are ignored; those within it count."""
    assert decode_tlbi("IPAS2E1", 0x12345 | 0xFF << 36).start == 0x1234_5000
    assert decode_tlbi("IPAS2E1", 0x12345 | 0x8FFF << 48).start == 0x1234_5000
    wide = Features(pa_bits=52, lpa=True, lpa2=True)
    assert decode_tlbi("IPAS2E1", 0x12345 | 0xF << 36, features=wide, vtcr=12).start == 0xF_0000_1234_5000
    assert decode_tlbi("IPAS2E1", 0x12345 | 0xF << 40, features=wide, vtcr=12).start == 0x1234_5000


@pytest.mark.parametrize("ia", [32, 36, 39, 40, 44, 48])
def test_ipa_beyond_input_size(ia):
    """The last page of the input size is named, the one after is not."""
    last = (1 << ia - 12) - 1
    assert decode_tlbi("IPAS2E1", last, vtcr=64 - ia).end == 1 << ia
    assert decode_tlbi("IPAS2E1", last + 1, vtcr=64 - ia).start == (None if ia < 48 else 0)


@given(xt=st.integers(0, ALL_ONES), machine=st.sampled_from(sorted(MACHINES)))
def test_any_va_operand(xt, machine):
    """By VA, one address or a range: sign-extended, within one half, ASID from the top 16 bits."""
    ours, theirs = MACHINES[machine]
    same(decode_tlbi("VALE1IS", xt, features=ours), model.single_va(theirs, xt))
    got = decode_tlbi("RVAE1OS", xt, features=ours)
    same(got, model.range_va(theirs, xt))
    assert got.asid == xt >> 48 == decode_tlbi("ASIDE1", xt, features=ours).asid
    assert decode_tlbi("RVAAE1OS", xt, features=ours).asid is None
    for name in ("ASIDE1", "VMALLE1", "ALLE1", "VMALLS12E1IS"):
        assert decode_tlbi(name, xt, features=ours)[3:7] == (None,) * 4


def test_va_range_stays_in_its_half():
    """A range from just below the middle or the top ends there."""
    lower = 1 << 46 | 31 << 39 | ((1 << 36) - 1)
    assert decode_tlbi("RVAE1", lower)[3:5] == ((1 << 48) - 4 * K, 1 << 48)
    upper = 1 << 46 | 31 << 39 | ((1 << 37) - 1)
    assert decode_tlbi("RVAE1", upper)[3:5] == ((1 << 64) - 4 * K, 1 << 64)
    assert decode_tlbi("RVAE1", 1 << 46 | 1 << 36)[3:5] == ((1 << 64) - (1 << 48), (1 << 64) - (1 << 48) + 8 * K)


# Any word


def test_any_word():
    """10^5 words, most of them near a TLBI, with any operand: the operation of the table, or undefined."""
    rng = np.random.default_rng(3)
    words = rng.integers(0, 1 << 32, 100_000, dtype=np.uint64)
    near = rng.random(len(words)) < 0.9
    words[near] = 0xD508_0000 | words[near] & 0x7_FFFF
    crn = rng.random(len(words)) < 0.6
    words[crn] = words[crn] & ~np.uint64(0xE000) | np.uint64(0x8000)
    operands = rng.integers(0, 1 << 64, len(words), dtype=np.uint64)
    vtcrs = rng.integers(0, 1 << 64, len(words), dtype=np.uint64)
    by_word = {op.word: op for op in OPERATIONS.values()}
    machines = [machine[0] for machine in MACHINES.values()]
    seen, undefined = set(), 0
    for n, (word, xt, vtcr) in enumerate(zip(words.tolist(), operands.tolist(), vtcrs.tolist(), strict=True)):
        feat, dialect = machines[n % len(machines)], ("exact", "kvm72")[n & 1]
        op = by_word.get(word & ~0x1F)
        try:
            got = decode_tlbi(word, xt, features=feat, vtcr=vtcr, dialect=dialect)
        except UndefinedInstruction:
            assert op is None
            undefined += 1
            continue
        assert got.name == op.name
        assert got.start is None or 0 <= got.start < got.end <= 1 << 64
        seen.add(got.name)
    assert len(seen) == 126 and undefined > 10_000


@given(word=st.integers(0, (1 << 32) - 1), xt=st.integers(0, ALL_ONES))
def test_any_word_applied(word, xt):
    """An engine takes any word: it does what the operation says or raises UndefinedInstruction."""
    vm = s2shadow.NestedVM(s2shadow.GuestMemory())
    for one in (word, 0xD508_8000 | word & 0x7_1FFF):
        try:
            assert vm.vcpus[0].tlbi(one, xt).removed == 0
        except UndefinedInstruction:
            assert one & ~0x1F not in {op.word for op in OPERATIONS.values()}
