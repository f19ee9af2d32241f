"""What a shadow leaf must be for a leaf of L1's stage 2 over a leaf of the host's."""

from dataclasses import dataclass

from .walk import ALL, EXEC, EXEC_EL0, KILO4, KILO16, KILO64, bits

LEAF_BITS = {KILO4: (12, 21, 30), KILO16: (14, 25), KILO64: (16, 29)}
BLOCK_OF_52_BITS = {KILO4: 39, KILO16: 36, KILO64: 42}  # what a host of 52-bit addresses has besides
STAGE2_OFF = -2


def leaf_sizes(features):
    """Sizes of the host's leaves, smallest first."""
    wide = (BLOCK_OF_52_BITS[features.host_granule],) if features.pa_bits == 52 else ()
    return tuple(1 << n for n in LEAF_BITS[features.host_granule] + wide)


def host_ds(features):
    """Whether the host's descriptors are those of VTCR.DS=1."""
    return features.pa_bits == 52 and features.host_granule != KILO64


@dataclass
class Host:
    """The host's leaf around the address that the guest's leaf gives."""

    pa: int  # of the whole block
    size: int
    perm: int = ALL
    memattr: int = 0b0110
    sh: int = 3


@dataclass
class Combined:
    desc: int
    size: int
    perm: int
    memattr: int
    sh: int
    guest_level: int


def combine(guest, host, features, guest_fwb, host_fwb, attributes="architectural", guest_cd=False):
    """guest: a Walk, or None with stage 2 off. host: a Host around guest.pa."""
    if guest is None or guest.level == STAGE2_OFF:
        size, level, offset = host.size, STAGE2_OFF, 0
        perm, memattr, sh = host.perm, host.memattr, 3
        if attributes == "architectural":
            sh = combine_sh(0, host.sh, memattr, host_fwb)
    else:
        size = common_size(features, guest.size, host.size)
        level, offset = guest.level, guest.pa & (host.size - 1)
        perm = guest.perm & host.perm
        memattr, sh = host.memattr, 3
        if attributes == "architectural":
            memattr = combine_memattr(guest.memattr, host.memattr, guest_fwb, host_fwb, guest_cd)
            sh = combine_sh(guest.sh, host.sh, memattr, host_fwb)
    if host_ds(features):
        sh = 3  # VTCR.SH0 says so for every leaf
    perm = without_xnx(perm, features)
    pa = host.pa + offset & ~(size - 1)
    return Combined(descriptor(features, pa, size, perm, memattr, sh, level), size, perm, memattr, sh, level)


def common_size(features, guest_size, host_size):
    return max(s for s in leaf_sizes(features) if s <= min(guest_size, host_size))


def without_xnx(perm, features):
    both = EXEC | EXEC_EL0
    return perm if features.xnx or perm & both == both else perm & ~both


def descriptor(features, pa, size, perm, memattr, sh, guest_level):
    page = size == features.host_granule
    xn = {EXEC | EXEC_EL0: 0, EXEC_EL0: 1, 0: 2, EXEC: 3}[perm & (EXEC | EXEC_EL0)]
    tag = guest_level + 2
    desc = (3 if page else 1) | memattr << 2 | (perm & 3) << 6 | 1 << 10 | xn << 53 | tag << 55
    if host_ds(features):
        return desc | bits(pa, 49, 0) | bits(pa, 51, 50) << 8
    return desc | bits(pa, 47, 0) | bits(pa, 51, 48) << 12 | sh << 8


def output_of(desc, features, size):
    """The address in a leaf of the host's."""
    pa = bits(desc, 47, 12) << 12
    if host_ds(features):
        pa |= bits(desc, 49, 48) << 48 | bits(desc, 9, 8) << 50
    elif features.pa_bits == 52:
        pa |= bits(desc, 15, 12) << 48
    return pa & -size


# Shareability


def combine_sh(a, b, memattr, fwb):
    non_cacheable = 0b101
    weak = not memattr & (4 if fwb else 12) or memattr == non_cacheable
    return 2 if weak or 2 in (a, b) else 3 if 3 in (a, b) else 0


# Memory attributes. Without FWB a code is two halves, outer and inner, each non-cacheable < write-through <
# write-back; with FWB it is one of: device types, force non-cacheable, force write-back, as stage 1.

NC, WT, WB = 1, 2, 3
FORCE_NC, FORCE_WB, AS_STAGE1 = 0b101, 0b110, 0b111


def is_device(code):
    return code < 4


def normal_form(code, fwb):
    """The code with reserved values replaced by what they act as."""
    if fwb:
        return FORCE_NC if code & 7 == 4 else code & 7
    if is_device(code):
        return code
    return (code >> 2) << 2 | (code & 3 or NC)


def combine_memattr(guest, host, guest_fwb, host_fwb, guest_cd=False):
    guest, host = normal_form(guest, guest_fwb), normal_form(host, host_fwb)
    if guest_cd and not is_device(guest):
        guest = NC << 2 | NC  # HCR_EL2.CD; FORCE_NC is the same code
    if host_fwb:
        return over_fwb_host(guest, host, guest_fwb)
    return over_plain_host(guest, host, guest_fwb)


def over_fwb_host(guest, host, guest_fwb):
    if host == FORCE_WB:
        return FORCE_WB
    if is_device(host):
        return min(guest, host) if is_device(guest) else host
    if is_device(guest):
        return guest
    if host == FORCE_NC:
        return FORCE_NC
    if guest_fwb:
        return guest
    write_back = WB << 2 | WB
    return AS_STAGE1 if guest == write_back else FORCE_NC


def over_plain_host(guest, host, guest_fwb):
    if is_device(guest) or is_device(host):
        return min(guest, host) if is_device(guest) and is_device(host) else guest if is_device(guest) else host
    if guest_fwb:
        return NC << 2 | NC if guest == FORCE_NC else host
    return min(guest >> 2, host >> 2) << 2 | min(guest & 3, host & 3)
