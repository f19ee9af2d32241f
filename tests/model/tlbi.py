"""TLBI by the book: what an operand names, which leaves must go for it, and which Linux 7.2 removes.

Leaves are named by (context index, ipa). Nothing here looks anything up cleverly: each question goes to every leaf.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

from .vm import guest_leaf_size, overlaps
from .walk import KILO4, KILO16, KILO64, Config, bits

TABLE = Path(__file__).parent.parent / "data" / "tlbi_ops.csv"
FLAGS = ("range", "last_level", "nxs", "takes_operand")
NUMBERS = ("op0", "op1", "crn", "crm", "op2")
TG_GRANULE = {1: KILO4, 2: KILO16, 3: KILO64}
K, M, G = 1 << 10, 1 << 20, 1 << 30
HCR_E2H, HCR_TGE = 1 << 34, 1 << 27


@dataclass(frozen=True)
class Op:
    name: str
    encoding: tuple  # op1, CRn, CRm, op2
    regime: str
    scope: str
    range: bool
    last_level: bool
    shareability: str
    nxs: bool
    needs: frozenset  # FEAT_*
    takes_operand: bool

    @property
    def word(self):
        """The instruction without its register."""
        op1, crn, crm, op2 = self.encoding
        return 0xD508_0000 | op1 << 16 | crn << 12 | crm << 8 | op2 << 5


def read_operations():
    found = {}
    for row in csv.DictReader(TABLE.read_text().splitlines()):
        flags = {name: row[name] == "1" for name in FLAGS}
        encoding = tuple(int(row[name]) for name in NUMBERS[1:])
        needs = frozenset(row["feature"].split("+")) - {"BASE"}
        found[row["name"]] = Op(row["name"], encoding, row["regime"], row["scope"], shareability=row["shareability"],
                                needs=needs, **flags)  # fmt: skip
    return found


OPERATIONS = read_operations()


def lacking(op, features):
    """The features that the operation needs and the machine does not have."""
    has = {"FEAT_TLBIOS": features.tlbios, "FEAT_TLBIRANGE": features.range, "FEAT_XS": features.xs}
    return {name for name in op.needs if not has[name]}


# What an operand names


@dataclass(frozen=True)
class Named:
    """[start, end); granule and level are the hint, or None."""

    start: int
    end: int
    granule: int = None
    level: int = None


def single_hint(features, xt):
    """TTL[3:0] of an operation by address -> (granule, level), or (None, None) where it is no hint."""
    granule, level = TG_GRANULE.get(bits(xt, 47, 46)), bits(xt, 45, 44)
    smallest = {
        KILO4: 0 if features.lpa2 else 1,
        KILO16: 1 if features.lpa2 else 2,
        KILO64: 1 if features.lpa else 2,
    }
    usable = features.ttl and granule and level >= smallest[granule]
    return (granule, level) if usable else (None, None)


def single_ipa(features, xt):
    """IPAS2E1 and its like name one page of 4K."""
    top = 39 if features.pa_bits >= 52 else 35
    start = bits(xt, top, 0) << 12
    return Named(start, start + 4 * K, *single_hint(features, xt))


def single_va(features, xt):
    start = bits(xt, 43, 0) << 12
    if bits(start, 55, 55):
        start |= 0xFF << 56
    return Named(start, start + 4 * K, *single_hint(features, xt))


def range_of(features, xt, ds, granule):
    """(base, bytes, level) of a range operand."""
    page_bits = granule.bit_length() - 1
    size = (bits(xt, 43, 39) + 1 << 5 * bits(xt, 45, 44) + 1) * granule
    level = bits(xt, 38, 37)
    reserved = level == 1 and granule == KILO16 and not features.lpa2
    return bits(xt, 36, 0) << (16 if ds else page_bits), size, None if reserved else level or None


def range_ipa(features, xt, ds):
    granule = TG_GRANULE.get(bits(xt, 47, 46))
    if granule is None:
        return None
    base, size, level = range_of(features, xt, ds, granule)
    return Named(base, base + size, granule, level)


def range_va(features, xt):
    """Sign-extended, and held within its half of the address space."""
    granule = TG_GRANULE.get(bits(xt, 47, 46))
    if granule is None:
        return None
    base, size, level = range_of(features, xt, False, granule)
    half = 1 << 36 + granule.bit_length() - 1
    if base < half:
        return Named(base, min(base + size, half), granule, level)
    base += (1 << 64) - 2 * half
    return Named(base, min(base + size, 1 << 64), granule, level)


def range_ipa_kvm72(features, xt, limit):
    """TG=00 counts as 64K, DS is not known, the base is sign-extended at bit 48, the TTL unused."""
    granule = TG_GRANULE.get(bits(xt, 47, 46), KILO64)
    base, size, level = range_of(features, xt, False, granule)
    if bits(base, 48, 48):
        return None
    return clamped(Named(bits(base, 47, 0), bits(base, 47, 0) + size, granule, level), limit)


def clamped(named, limit):
    """None where it starts at or beyond the limit."""
    if named is None or named.start >= limit:
        return None
    return Named(named.start, min(named.end, limit), named.granule, named.level)


def named_exactly(op, xt, features, vtcr):
    """What an operation by IPA names: VTCR gives DS and the input size."""
    ds = features.lpa2 and bits(vtcr, 32, 32)
    named = range_ipa(features, xt, ds) if op.range else single_ipa(features, xt)
    return clamped(named, 1 << min(64 - bits(vtcr, 5, 0), 52))


# Which leaves


def contexts_with(vm, vmid):
    return [(index, ctx) for index, ctx in enumerate(vm.contexts) if ctx.key is not None and ctx.vmid == vmid]


def leaves_of(contexts, condition):
    return {(index, ipa) for index, ctx in contexts for ipa, leaf in ctx.leaves.items() if condition(ctx, ipa, leaf)}


def everything(ctx, ipa, leaf):
    return True


def required(vm, op, xt, vttbr, vtcr):
    """The leaves that the architecture wants gone."""
    same_vmid = contexts_with(vm, Config(vttbr, vtcr, vm.features).vmid)
    if op.scope == "ALL" and op.regime == "EL10_S12":
        return leaves_of(enumerate(vm.contexts), everything)
    if op.scope == "VMALLS12":
        return leaves_of(same_vmid, everything)
    if op.scope != "IPA":
        return set()
    named = named_exactly(op, xt, vm.features, vtcr)

    def falls(ctx, ipa, leaf):
        """Some part of the leaf of L1's that this is a piece of is named, and no hint speaks against it."""
        if not ctx.enabled or named is None:
            return False
        size = guest_leaf_size(ctx.granule, leaf.guest_level)
        hinted = named.granule in (None, ctx.granule) and named.level in (None, leaf.guest_level)
        return hinted and overlaps(ipa & -size, size, named.start, named.end)

    return leaves_of(same_vmid, falls)


# Linux 7.2

SIZES_KVM72 = {KILO4: (4 * K, 2 * M, G), KILO16: (16 * K, 32 * M), KILO64: (64 * K, 512 * M)}


def level_size(granule, level):
    """What Linux makes of a level: 0 where it has no block of that level."""
    first = 1 if granule == KILO4 else 2
    return guest_leaf_size(granule, level) if granule and level >= first else 0


def tag_of(leaf):
    """The level that Linux keeps in a leaf: two bits, so 0 stands for none."""
    return max(leaf.guest_level, 0)


def inferred_size(vm, ctx, address):
    """Spec 5.1: looks where a leaf of each size would start, smallest first; 0 where nothing says."""
    at = address
    for size in SIZES_KVM72[ctx.granule]:
        at &= -size
        leaf = ctx.find(at, vm.sizes)[1]
        if leaf is None or tag_of(leaf) == 0:
            continue
        found = level_size(ctx.granule, tag_of(leaf))
        return found if address < at + (found or G) else 0
    return 0


def block_kvm72(vm, ctx, xt):
    """What one IPA stands for in this context."""
    address = bits(xt, 35, 0) << 12
    if vm.features.ttl and bits(xt, 47, 44):
        size = level_size(TG_GRANULE.get(bits(xt, 47, 46)), bits(xt, 45, 44))
    else:
        size = inferred_size(vm, ctx, address)
    size = size or SIZES_KVM72[ctx.granule][-1]
    return address & -size, (address & -size) + size


def removed_kvm72(vm, op, xt, vttbr, vtcr):
    """The leaves that Linux 7.2 removes: whole blocks, hit anywhere, in every context of the VMID."""
    if op.scope != "IPA":
        return required(vm, op, xt, vttbr, vtcr)
    limit = 1 << min(48, vm.features.pa_bits)
    gone = set()
    for index, ctx in contexts_with(vm, Config(vttbr, vtcr, vm.features).vmid):
        if op.range:
            named = range_ipa_kvm72(vm.features, xt, limit)
            start, end = (named.start, named.end) if named else (0, 0)
        else:
            start, end = block_kvm72(vm, ctx, xt)
        gone |= {(index, ipa) for ipa, leaf in ctx.leaves.items() if overlaps(ipa, leaf.size, start, end)}
    return gone


def apply(vm, name, xt, vttbr, vtcr, dialect="exact"):
    """Does it -> (leaves removed, those of them that had to go) as sets of (context, ipa)."""
    op = OPERATIONS[name]
    had_to = required(vm, op, xt, vttbr, vtcr)
    gone = had_to if dialect == "exact" else removed_kvm72(vm, op, xt, vttbr, vtcr)
    if op.regime == "EL10_S12":
        vm.tlbi_all() if op.scope == "ALL" else vm.tlbi_vmid(vttbr, vtcr)
    else:
        for index, ipa in gone:
            vm.remove(vm.contexts[index], ipa)
    return gone, had_to & gone
