"""The combiner: what a shadow leaf must be, given L1's leaf and the host's leaf under it."""

from collections import namedtuple

from s2shadow.arch cimport (
    ACCESS_EXEC, DESC_AF, DESC_MEMATTR_SHIFT, DESC_SH_SHIFT, DESC_TABLE, DESC_TAG_SHIFT, DESC_VALID, FINAL_LEVEL,
    LEVEL_STAGE2_OFF, PERM_EXEC_EL0, SH_ISH, SH_NSH, SH_OSH, encode_oa, leaf_level_within, level_span,
    memattr_is_device, oa_format_init, perm_to_s2ap_xn,
)
from s2shadow.config cimport features_t, fill_features
from s2shadow.walker cimport Walk, walk_t
from s2shadow.constants import perm_text, size_text
from s2shadow.features import Features
from s2shadow.mapping import HostMapping, memattr_code, perm_mask

cdef enum:
    HALF_NC = 1                 # inner or outer half of a Normal MemAttr without FWB
    NC = 0x5                    # Normal Non-cacheable, in both encodings
    FWB_WB = 0x6
    FWB_AS_S1 = 0x7

_Combined = namedtuple("Combined", "desc size perm memattr sh guest_level")


class Combined(_Combined):
    """The shadow leaf: ``desc``, the descriptor (AF set, with the address of its block); ``size`` in bytes; ``perm``, a
    mask of ``Access``; ``memattr``, MemAttr[3:0]; ``sh``, SH[1:0]; ``guest_level``, of L1's leaf, -2 where its stage 2
    is off."""

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


cdef void host_oa_format(const features_t *features, oa_format_t *oa) noexcept nogil:
    """The host's own tables hold 52-bit addresses where the machine has them."""
    oa_format_init(oa, features.host_granule_bits, features.pa_bits > 48)


cdef uint64_t leaf_desc(const oa_format_t *oa, uint64_t pa, int level, uint8_t perm, uint8_t memattr, uint8_t sh,
                        bint xnx) noexcept nogil:
    """A stage-2 leaf descriptor with the access flag set."""
    cdef uint64_t desc = encode_oa(oa, pa) | DESC_VALID | DESC_AF | perm_to_s2ap_xn(perm, xnx)
    desc |= <uint64_t>memattr << DESC_MEMATTR_SHIFT
    if not oa.implies_sh:
        desc |= <uint64_t>sh << DESC_SH_SHIFT
    if level == FINAL_LEVEL:
        desc |= DESC_TABLE
    return desc


cdef inline uint8_t without_cache(uint8_t code, bint fwb) noexcept nogil:
    """What L1 maps as Normal is Non-cacheable under HCR_EL2.CD. That spares instruction fetches, but a shadow leaf
    has one memory type for all: the stricter one."""
    return code if memattr_is_device(code, fwb) else NC


cdef void combine_leaves(const walk_t *guest, const host_leaf_t *host, const combine_rules_t *rules,
                         combined_t *out) noexcept nogil:
    """``guest.pa`` is the cIPA in question, also with stage 2 off (``guest.level`` says so)."""
    cdef uint64_t pa = host.pa + (guest.pa & (host.size - 1))
    cdef uint8_t execute, memattr
    out.guest_level = guest.level
    out.level = <int8_t>leaf_level_within(rules.granule_bits, rules.oa.wide,
                                          guest.size if guest.size < host.size else host.size)
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
        memattr = without_cache(guest.memattr, rules.guest_fwb) if rules.guest_cd else guest.memattr
        out.memattr = combine_memattr(memattr, host.memattr, rules.guest_fwb, rules.host_fwb)
        out.sh = combine_shareability(guest.sh, host.sh, out.memattr, rules.host_fwb)
    if rules.oa.implies_sh:
        out.sh = SH_ISH                     # VTCR_EL2.SH0 of the host, for all leaves
    out.desc = leaf_desc(&rules.oa, pa & ~(out.size - 1), out.level, out.perm, out.memattr, out.sh,
                         rules.xnx)
    out.desc |= <uint64_t>(guest.level - LEVEL_STAGE2_OFF) << DESC_TAG_SHIFT


def combine(guest, host, *, features=None, bint guest_fwb=False, bint host_fwb=False, attributes="architectural",
            bint guest_cd=False):
    """What the shadow leaf must be -> ``Combined``.

    ``guest`` is the ``Walk`` of L1's leaf, or None when L1's stage 2 is off. ``host`` is the ``Walk`` of the
    host's leaf at the guest's output address, or a ``HostMapping``. ``attributes``: ``"architectural"`` composes
    memory type and shareability as three real stages would; ``"kvm72"`` ignores L1's, as Linux does. ``guest_cd`` is
    L1's HCR_EL2.CD: its Normal memory counts as Non-cacheable. With ``features.pa_bits`` of 52 the descriptor has the
    host's 52-bit form; a 4K or 16K one has no SH then, and ``sh`` is inner shareable, the host's VTCR_EL2.SH0.
    ``ValueError`` for a walk that faulted. Source: Arm ARM, combining of stage 1 and stage 2 attributes, twice.
    """
    cdef walk_t g
    cdef host_leaf_t h
    cdef features_t f
    cdef combine_rules_t rules
    cdef combined_t out
    if features is None:
        features = Features()
    if attributes not in ("architectural", "kvm72"):
        raise ValueError(f"attributes must be 'architectural' or 'kvm72', got {attributes!r}")
    fill_features(features, &f)
    host_oa_format(&f, &rules.oa)
    rules.granule_bits = f.host_granule_bits
    rules.guest_cd = guest_cd
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
