"""The combiner: what a shadow leaf must be, given L1's leaf and the host's leaf under it."""

from collections import namedtuple

from s2shadow.arch cimport (
    ACCESS_EXEC, DESC_AF, DESC_MEMATTR_SHIFT, DESC_SH_SHIFT, DESC_TABLE, DESC_TAG_SHIFT, DESC_VALID, FINAL_LEVEL,
    LEVEL_STAGE2_OFF, PERM_EXEC_EL0, level_span, memattr_is_device, perm_to_s2ap_xn,
)
from s2shadow.walker cimport Walk, walk_t
from s2shadow.constants import perm_text, size_text
from s2shadow.features import Features
from s2shadow.mapping import HostMapping, memattr_code, perm_mask

cdef enum:
    SH_NSH = 0
    SH_OSH = 2
    SH_ISH = 3

cdef enum:
    HALF_NC = 1                 # inner or outer half of a Normal MemAttr without FWB
    NC = 0x5                    # Normal Non-cacheable, in both encodings
    FWB_WB = 0x6
    FWB_AS_S1 = 0x7

_Combined = namedtuple("Combined", "desc size perm memattr sh guest_level")


class Combined(_Combined):
    """The shadow leaf: descriptor, size in bytes, permission mask, MemAttr[3:0], SH[1:0], level of L1's leaf."""

    __slots__ = ()

    def __repr__(self):
        return (f"Combined({self.desc:#018x}, {size_text(self.size)}, {perm_text(self.perm)}, "
                f"memattr={self.memattr:#06b}, sh={self.sh}, guest_level={self.guest_level})")


cdef inline uint8_t weaker(uint8_t a, uint8_t b) noexcept nogil:
    return a if a < b else b


cdef inline uint8_t normal_half(uint8_t half) noexcept nogil:
    """A reserved half acts as Non-cacheable (CONSTRAINED UNPREDICTABLE)."""
    return half if half else HALF_NC


cdef inline uint8_t defined_fwb(uint8_t code) noexcept nogil:
    """MemAttr[3] is RES0 with FWB; the reserved 100 acts as 101."""
    code &= 7
    return NC if code == 4 else code


cdef inline bint is_write_back(uint8_t code) noexcept nogil:
    return code == 0xF


cdef uint8_t combine_memattr_plain(uint8_t guest, uint8_t host) noexcept nogil:
    """Both without FWB: Device wins, the weaker type wins, else the weaker of each half. Always exact."""
    if not guest & 0xC:
        return guest if host & 0xC else weaker(guest, host)
    if not host & 0xC:
        return host
    return (weaker(normal_half(guest >> 2), normal_half(host >> 2)) << 2
            | weaker(normal_half(guest & 3), normal_half(host & 3)))


cdef uint8_t combine_memattr_under_fwb(uint8_t guest, bint guest_device, uint8_t guest_normal,
                                       uint8_t host) noexcept nogil:
    """The host uses FWB. ``guest_normal`` is what a Normal guest code becomes under the host's "as stage 1"."""
    if host == FWB_WB:
        return FWB_WB
    if host == FWB_AS_S1:
        return guest if guest_device else guest_normal
    if host == NC:
        return guest if guest_device else NC
    return weaker(guest, host) if guest_device else host


cdef uint8_t combine_memattr(uint8_t guest, uint8_t host, bint guest_fwb, bint host_fwb) noexcept nogil:
    """Spec 02, section 6; ``memattr_compose.csv`` row by row."""
    if host_fwb:
        host = defined_fwb(host)
        if guest_fwb:
            guest = defined_fwb(guest)
            return combine_memattr_under_fwb(guest, not guest & 4, guest, host)
        # Write-Through cannot be expressed with FWB: the stricter Non-cacheable stands in.
        return combine_memattr_under_fwb(guest, not guest & 0xC, FWB_AS_S1 if is_write_back(guest) else NC, host)
    if guest_fwb:
        guest = defined_fwb(guest)
        if guest == FWB_WB or guest == FWB_AS_S1:       # force-WB cannot be expressed without FWB
            return combine_memattr_plain(0xF, host)
        return combine_memattr_plain(guest, host)
    return combine_memattr_plain(guest, host)


cdef uint8_t combine_shareability(uint8_t guest, uint8_t host, uint8_t memattr, bint fwb) noexcept nogil:
    """Outer wins over inner over none; Device and Non-cacheable are outer shareable whatever SH says."""
    if memattr_is_device(memattr, fwb) or memattr == NC:
        return SH_OSH
    if guest == SH_OSH or host == SH_OSH:
        return SH_OSH
    if guest == SH_ISH or host == SH_ISH:
        return SH_ISH
    return SH_NSH


cdef uint64_t leaf_desc(uint64_t pa, int level, uint8_t perm, uint8_t memattr, uint8_t sh, bint xnx) noexcept nogil:
    """A stage-2 leaf descriptor with the access flag set."""
    cdef uint64_t desc = pa | DESC_VALID | DESC_AF | perm_to_s2ap_xn(perm, xnx)
    desc |= <uint64_t>memattr << DESC_MEMATTR_SHIFT | <uint64_t>sh << DESC_SH_SHIFT
    if level == FINAL_LEVEL:
        desc |= DESC_TABLE
    return desc


cdef inline int widest_level(int granule_bits, uint64_t size) noexcept nogil:
    """Level of the largest host leaf that is not above ``size``."""
    if granule_bits == 12 and size >= level_span(12, 1):
        return 1
    return 2 if size >= level_span(granule_bits, 2) else 3


cdef void combine_leaves(const walk_t *guest, const host_leaf_t *host, const combine_rules_t *rules,
                         combined_t *out) noexcept nogil:
    """``guest.pa`` is the cIPA in question, also with stage 2 off (``guest.level`` says so)."""
    cdef uint64_t pa = host.pa + (guest.pa & (host.size - 1))
    cdef uint8_t execute
    out.guest_level = guest.level
    out.level = <int8_t>widest_level(rules.granule_bits, guest.size if guest.size < host.size else host.size)
    out.size = level_span(rules.granule_bits, out.level)
    out.perm = guest.perm & host.perm
    execute = out.perm & (ACCESS_EXEC | PERM_EXEC_EL0)
    if not rules.xnx and execute != (ACCESS_EXEC | PERM_EXEC_EL0):
        out.perm &= ~(ACCESS_EXEC | PERM_EXEC_EL0)
    if rules.ignore_guest_attributes:
        out.memattr = host.memattr
        out.sh = SH_ISH
    elif guest.level == LEVEL_STAGE2_OFF:
        out.memattr = host.memattr
        out.sh = combine_shareability(SH_NSH, host.sh, host.memattr, rules.host_fwb)
    else:
        out.memattr = combine_memattr(guest.memattr, host.memattr, rules.guest_fwb, rules.host_fwb)
        out.sh = combine_shareability(guest.sh, host.sh, out.memattr, rules.host_fwb)
    out.desc = leaf_desc(pa & ~(out.size - 1), out.level, out.perm, out.memattr, out.sh, rules.xnx)
    out.desc |= <uint64_t>(guest.level - LEVEL_STAGE2_OFF) << DESC_TAG_SHIFT


def combine(guest, host, *, features=None, bint guest_fwb=False, bint host_fwb=False, attributes="architectural"):
    """What the shadow leaf must be -> ``Combined``.

    ``guest`` is the ``Walk`` of L1's leaf, or None when L1's stage 2 is off. ``host`` is the ``Walk`` of the
    host's leaf at the guest's output address, or a ``HostMapping``. ``attributes``: ``"architectural"`` composes
    memory type and shareability as three real stages would; ``"kvm72"`` ignores L1's, as Linux does. ``ValueError``
    for a walk that faulted. Source: spec of the shadow leaf in Arm ARM terms, stage 1 and 2 attribute combining.
    """
    cdef walk_t g
    cdef host_leaf_t h
    cdef combine_rules_t rules
    cdef combined_t out
    if features is None:
        features = Features()
    if attributes not in ("architectural", "kvm72"):
        raise ValueError(f"attributes must be 'architectural' or 'kvm72', got {attributes!r}")
    rules.granule_bits = features.host_granule.bit_length() - 1
    rules.xnx = features.xnx
    rules.guest_fwb = guest_fwb
    rules.host_fwb = host_fwb
    rules.ignore_guest_attributes = attributes == "kvm72"
    if isinstance(host, Walk):
        if (<Walk>host).c.status:
            raise ValueError(f"host walk faulted: {host.fault}")
        h.size = host.size
        h.pa = host.pa & ~(h.size - 1)
        h.perm = host.perm
        h.memattr = host.memattr
        h.sh = host.sh
        g.pa = host.pa
    elif isinstance(host, HostMapping):
        h.pa = host.pa
        h.size = host.size
        h.perm = perm_mask(host.perm)
        h.memattr = memattr_code(host.memattr, host_fwb)
        h.sh = SH_ISH
        g.pa = 0
    else:
        raise TypeError(f"host must be a Walk or a HostMapping, got {type(host).__name__}")
    if h.size < level_span(rules.granule_bits, FINAL_LEVEL):
        raise ValueError(f"host size {h.size} is below the host granule {features.host_granule}")
    if guest is None:
        g.level = LEVEL_STAGE2_OFF
        g.size = h.size
        g.perm = h.perm
    elif isinstance(guest, Walk):
        if (<Walk>guest).c.status:
            raise ValueError(f"guest walk faulted: {guest.fault}")
        g = (<Walk>guest).c
        if isinstance(host, Walk):
            g.pa = host.pa
        if g.size < level_span(rules.granule_bits, FINAL_LEVEL):
            raise ValueError(f"guest leaf of {g.size} bytes is below the host granule {features.host_granule}")
    else:
        raise TypeError(f"guest must be a Walk or None, got {type(guest).__name__}")
    combine_leaves(&g, &h, &rules, &out)
    return Combined(out.desc, out.size, out.perm, out.memattr, out.sh, out.guest_level)
