"""Stage-2 configuration as L1 programs it (spec 01, sections 1, 2 and 4)."""

from s2shadow.arch cimport (
    DESC_AF, DESC_CONTIGUOUS, FSC_ADDRESS_SIZE, FSC_TRANSLATION, largest_leaf_level, level_shift, oa_format_init,
)
from s2shadow.arguments cimport as_u64
from s2shadow.constants import HCR_VM, size_text
from s2shadow.features import Features

cdef enum:
    VTCR_TG0_4K = 0
    VTCR_TG0_64K = 1
    VTCR_TG0_16K = 2

cdef inline uint64_t field(uint64_t value, int shift, int width) noexcept nogil:
    return (value >> shift) & ((<uint64_t>1 << width) - 1)


cdef int fill_features(object features, features_t *out) except -1:
    """The C form of a ``Features``."""
    if not isinstance(features, Features):
        raise TypeError(f"features must be a Features, got {type(features).__name__}")
    out.pa_bits = features.pa_bits
    out.granules = 0
    for granule in features.granules:
        out.granules |= {4096: 1, 16384: 2, 65536: 4}[granule]
    out.hafdbs = features.hafdbs
    out.vmid16 = features.vmid_bits == 16
    out.xnx = features.xnx
    out.fwb = features.fwb
    out.lpa2 = features.lpa2
    out.lpa = features.lpa
    out.ttst = features.ttst
    out.bbm = features.bbm
    out.s2pie = features.s2pie
    out.ttl = features.ttl
    out.range = features.range
    out.tlbios = features.tlbios
    out.xs = features.xs
    out.host_granule_bits = features.host_granule.bit_length() - 1
    return 0


cdef uint8_t effective_granule_bits(const features_t *features, uint64_t tg0) noexcept nogil:
    """A reserved or unadvertised TG0 acts as an implemented size (CONSTRAINED UNPREDICTABLE): here the smallest."""
    if tg0 == VTCR_TG0_4K and features.granules & 1:
        return 12
    if tg0 == VTCR_TG0_16K and features.granules & 2:
        return 14
    if tg0 == VTCR_TG0_64K and features.granules & 4:
        return 16
    return 12 if features.granules & 1 else 14 if features.granules & 2 else 16


cdef uint8_t decode_ps(uint64_t ps) noexcept nogil:
    if ps >= 6:
        return 52               # 111 acts as 110 with 64-bit descriptors
    return <uint8_t>(32 if ps == 0 else 36 if ps == 1 else 40 if ps == 2 else 42 if ps == 3 else 44 if ps == 4 else 48)


cdef int decode_start_level(const s2_config_t *config, const features_t *features, uint64_t vtcr) noexcept nogil:
    """SL0 and SL2 to a start level; 4 for what is reserved or needs a feature that is absent."""
    cdef uint64_t sl0 = field(vtcr, 6, 2)
    if config.granule_bits == 12:
        if config.ds and field(vtcr, 33, 1):
            return -1 if sl0 == 0 else 4
        if sl0 == 0:
            return 2
        if sl0 == 1:
            return 1
        if sl0 == 2:
            return 0 if features.pa_bits >= 44 else 4
        return 3 if features.ttst else 4
    if config.granule_bits == 14:
        if sl0 <= 1:
            return 3 - <int>sl0
        if sl0 == 2:
            return 1 if features.pa_bits >= 42 else 4
        return 0 if config.ds else 4
    if sl0 <= 1:
        return 3 - <int>sl0
    if sl0 == 2:
        return 1 if features.pa_bits >= 44 else 4
    return 4


cdef bint t0sz_in_range(const s2_config_t *config, const features_t *features, uint64_t t0sz) noexcept nogil:
    cdef int widest
    cdef int longest = 39
    if features.ttst:
        longest = 47 if config.granule_bits == 16 else 48
    if config.ds or (config.granule_bits == 16 and features.lpa):
        widest = 52
    else:
        widest = 48
    if features.pa_bits < widest:
        widest = features.pa_bits
    return <uint64_t>(64 - widest) <= t0sz <= <uint64_t>longest


cdef void decode_config(const features_t *features, uint64_t vttbr, uint64_t vtcr, uint64_t hcr,
                        bint big_endian, uint64_t s2pir, s2_config_t *config) noexcept nogil:
    """Fill ``config``. Never fails: an illegal configuration becomes the fault of its every walk."""
    cdef uint64_t t0sz = field(vtcr, 0, 6)
    cdef uint64_t ps = field(vtcr, 16, 3)
    cdef int oa_cap, start, shift, table_bits, level
    cdef bint wide_base, lpa

    config.enabled = (hcr & 1) != 0 or (hcr >> 12 & 1) != 0
    config.granule_bits = effective_granule_bits(features, field(vtcr, 14, 2))
    config.ds = features.lpa2 and config.granule_bits != 16 and field(vtcr, 32, 1) != 0
    lpa = features.lpa and config.granule_bits == 16 and features.pa_bits >= 52
    config.ha = features.hafdbs >= 1 and field(vtcr, 21, 1) != 0
    config.hd = features.hafdbs >= 2 and config.ha and field(vtcr, 22, 1) != 0
    config.sh0 = <uint8_t>field(vtcr, 12, 2)
    config.xnx = features.xnx
    config.bbm = features.bbm
    config.fwb = features.fwb and (hcr >> 46 & 1) != 0
    config.cd = (hcr >> 32 & 1) != 0
    config.ptw = (hcr >> 2 & 1) != 0
    config.big_endian = big_endian
    config.s2pie = features.s2pie and field(vtcr, 36, 1) != 0
    config.s2pir = s2pir if config.s2pie else 0
    config.pa_bits = features.pa_bits
    config.vmid = decode_vmid(features, vttbr, vtcr)
    config.ia_bits = <uint8_t>(64 - t0sz)
    oa_cap = 52 if config.ds or lpa else 48
    if features.pa_bits < oa_cap:
        oa_cap = features.pa_bits
    config.oa_bits = decode_ps(ps)
    if config.oa_bits > oa_cap:
        config.oa_bits = <uint8_t>oa_cap

    config.block_level = <int8_t>largest_leaf_level(config.granule_bits, config.ds or lpa)
    config.output_mask = (<uint64_t>1 << config.oa_bits) - 1
    oa_format_init(&config.oa, config.granule_bits, config.ds or lpa)
    config.plain_mask = 3 | config.oa.high_mask | config.oa.mask & ~config.output_mask
    config.leaf_mask = config.plain_mask | DESC_AF | DESC_CONTIGUOUS
    config.index_mask = (<uint64_t>1 << (config.granule_bits - 3)) - 1
    config.stride = config.granule_bits - 3
    config.entry_mask = (<uint64_t>1 << config.granule_bits) - 8
    for level in range(5):
        config.shifts[level] = <uint8_t>level_shift(config.granule_bits, level - 1)
    config.perm_mask = 0xF if config.xnx else 0xB
    config.sh_mask = 0 if config.oa.implies_sh else 0x300
    config.sh_implied = <uint64_t>config.sh0 << 8 if config.oa.implies_sh else 0

    # T0SZ, SL0, TG0, PS and what the features give a meaning: HA, HD, DS, SL2, S2PIE, and SH0 where it is the leaf's.
    config.walk_vtcr = vtcr & 0x7C0FF
    config.walk_vtcr |= <uint64_t>config.ha << 21 | <uint64_t>config.hd << 22 | <uint64_t>config.ds << 32
    config.walk_vtcr |= <uint64_t>config.s2pie << 36
    if config.ds:
        config.walk_vtcr |= vtcr & 0x3000
        if config.granule_bits == 12:
            config.walk_vtcr |= vtcr & (<uint64_t>1 << 33)

    config.has_error = 0
    config.walkable = 0
    config.plain = 0
    config.start_shift = 0
    config.error_fsc = 0
    config.concatenated_bits = 0
    config.base = 0
    start = decode_start_level(config, features, vtcr)
    config.start_level = <int8_t>start
    if start == 4 or not t0sz_in_range(config, features, t0sz):
        config.has_error = 1
        config.error_fsc = FSC_TRANSLATION
        return
    shift = level_shift(config.granule_bits, start)
    table_bits = config.granule_bits - 3
    if config.ia_bits < shift + 1 or config.ia_bits > shift + table_bits + 4:
        config.has_error = 1
        config.error_fsc = FSC_TRANSLATION
        return
    if config.ia_bits > shift + table_bits:
        config.concatenated_bits = <uint8_t>(config.ia_bits - shift - table_bits)

    wide_base = config.ds or (lpa and ps >= 6)
    if wide_base:
        config.base = (vttbr & 0xFFFFFFFFFFC0u) | field(vttbr, 2, 4) << 48
    else:
        config.base = vttbr & 0xFFFFFFFFFFFEu
    config.base &= ~((<uint64_t>1 << (config.ia_bits - shift + 3)) - 1)
    config.start_shift = <uint8_t>shift
    if config.base >> config.oa_bits:
        config.has_error = 1
        config.error_fsc = FSC_ADDRESS_SIZE
    config.walkable = config.enabled and not config.has_error
    config.plain = config.walkable and not (config.s2pie or config.bbm or config.big_endian)


cdef str fault_text(uint8_t fsc):
    """``translation fault, level 2`` and its kin."""
    if fsc == 0x29:
        return "address size fault, level -1"
    if fsc == 0x2B:
        return "translation fault, level -1"
    if fsc == 0x13:
        return "external abort on table walk, level -1"
    if fsc == 0x10:
        return "external abort"
    names = ("address size fault", "translation fault", "access flag fault", "permission fault", None,
             "external abort on table walk")
    return f"{names[fsc >> 2]}, level {fsc & 3}"


cdef class Stage2Config:
    """VTTBR_EL2, VTCR_EL2 and HCR_EL2, decoded under ``features``: what one stage-2 walk needs to know.

    ``features``, ``vttbr``, ``vtcr`` and ``hcr`` are as given (``features`` None: ``Features()``); ``big_endian`` is
    SCTLR_EL2.EE, ``s2pir`` S2PIR_EL2. What is no 64-bit number is a ``TypeError`` or ``ValueError``.
    Nothing that L1 can write raises: an illegal configuration shows in ``error``. A T0SZ outside the limits
    faults (it is never clamped); a reserved or unadvertised TG0 acts as the smallest advertised granule; a
    reserved PS acts as 52 bits; bits of absent features are RES0. Source: Arm ARM, VTCR_EL2 and VTTBR_EL2.
    """

    def __init__(self, vttbr, vtcr, features=None, hcr=HCR_VM, bint big_endian=False, s2pir=0):
        cdef features_t f
        self.features = Features() if features is None else features
        fill_features(self.features, &f)
        self.vttbr = as_u64(vttbr, "vttbr")
        self.vtcr = as_u64(vtcr, "vtcr")
        self.hcr = as_u64(hcr, "hcr")
        decode_config(&f, self.vttbr, self.vtcr, self.hcr, big_endian, as_u64(s2pir, "s2pir"), &self.c)

    @property
    def granule(self):
        """Bytes of the granule in effect."""
        return 1 << self.c.granule_bits

    @property
    def start_level(self):
        """Level of the first table, -1 to 3; None where SL0 names none."""
        return None if self.c.start_level == 4 else self.c.start_level

    @property
    def ia_bits(self):
        """Bits of IPA, 64 - T0SZ."""
        return self.c.ia_bits

    @property
    def oa_bits(self):
        """Bits of output address: PS, limited by the features."""
        return self.c.oa_bits

    @property
    def baddr(self):
        """Address of the start table, aligned down to its size."""
        return self.c.base

    @property
    def vmid(self):
        """VMID, masked by VTCR.VS."""
        return self.c.vmid

    @property
    def concatenated(self):
        """Number of start tables side by side, 1 to 16."""
        return 1 << self.c.concatenated_bits

    @property
    def enabled(self):
        """Whether stage 2 is on: HCR_EL2.VM or HCR_EL2.DC."""
        return bool(self.c.enabled)

    @property
    def big_endian(self):
        """Byte order of the tables: SCTLR_EL2.EE."""
        return bool(self.c.big_endian)

    @property
    def ds(self):
        """VTCR_EL2.DS in effect: 52-bit addresses with a granule of 4K or 16K, and no SH in leaves."""
        return bool(self.c.ds)

    @property
    def wide_output(self):
        """Whether descriptors hold 52-bit addresses: FEAT_LPA2's form with DS, FEAT_LPA's with a 64K granule."""
        return bool(self.c.oa.wide)

    @property
    def ha(self):
        """VTCR_EL2.HA in effect: hardware sets the access flag."""
        return bool(self.c.ha)

    @property
    def hd(self):
        """VTCR_EL2.HD in effect: hardware manages dirty state."""
        return bool(self.c.hd)

    @property
    def fwb(self):
        """HCR_EL2.FWB in effect."""
        return bool(self.c.fwb)

    @property
    def s2pie(self):
        """VTCR_EL2.S2PIE in effect: permissions come from S2PIR_EL2."""
        return bool(self.c.s2pie)

    @property
    def error(self):
        """None, or the fault that every walk under this configuration takes, as text."""
        return fault_text(self.c.error_fsc) if self.c.enabled and self.c.has_error else None

    def __repr__(self):
        if not self.c.enabled:
            return f"Stage2Config(VMID {self.vmid}, stage 2 off)"
        shape = self.error or (f"starts at level {self.start_level}"
                               + (f" ({self.concatenated} tables side by side)" if self.concatenated > 1 else ""))
        return (f"Stage2Config(VMID {self.vmid}, {size_text(self.granule)} granule, {self.ia_bits}-bit IPA, "
                f"{self.oa_bits}-bit output, {shape})")
