# Arm VMSAv8-64 stage 2: register fields, granule geometry, descriptor fields, fault codes.
# Pure inline functions; nothing here reads memory or keeps state.

from libc.stdint cimport int8_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    ACCESS_READ = 1
    ACCESS_WRITE = 2
    ACCESS_EXEC = 4
    ACCESS_EL0 = 8
    ACCESS_PTW = 16
    PERM_EXEC_EL0 = 32
    PERM_ALL = 39               # READ | WRITE | EXEC | EXEC_EL0

cdef enum:
    SH_NSH = 0
    SH_OSH = 2
    SH_ISH = 3

cdef enum:
    FINAL_LEVEL = 3
    LEVEL_STAGE2_OFF = -2       # guest level of a leaf made while L1's stage 2 was off

cdef enum:
    FSC_ADDRESS_SIZE = 0x00
    FSC_TRANSLATION = 0x04
    FSC_ACCESS_FLAG = 0x08
    FSC_PERMISSION = 0x0C
    FSC_EXTERNAL_ABORT = 0x10
    FSC_WALK_ABORT = 0x14

cdef enum:
    DESC_TYPE_SHIFT = 0
    DESC_MEMATTR_SHIFT = 2
    DESC_S2AP_SHIFT = 6
    DESC_SH_SHIFT = 8
    DESC_XN_SHIFT = 53
    DESC_TAG_SHIFT = 55         # software bits 57:55: guest level + 2

cdef extern from *:
    """
    #include <stdint.h>
    #define S2_DESC_VALID    (UINT64_C(1) << 0)
    #define S2_DESC_TABLE    (UINT64_C(1) << 1)
    #define S2_DESC_S2AP_R   (UINT64_C(1) << 6)
    #define S2_DESC_S2AP_W   (UINT64_C(1) << 7)
    #define S2_DESC_AF       (UINT64_C(1) << 10)
    #define S2_DESC_NT       (UINT64_C(1) << 16)
    #define S2_DESC_DBM      (UINT64_C(1) << 51)
    #define S2_DESC_CONT     (UINT64_C(1) << 52)
    #define S2_DESC_XN       (UINT64_C(3) << 53)
    #define S2_DESC_TAG      (UINT64_C(7) << 55)
    #define S2_DESC_HOST_W   (UINT64_C(1) << 58)
    #define S2_OA_48         UINT64_C(0x0000fffffffff000)
    /* by XN << 2 | S2AP: 00 execute at both levels, 01 at EL0, 10 at none, 11 at EL1 */
    static const uint8_t s2_perm_of_xn_s2ap[16] = { 36, 37, 38, 39, 32, 33, 34, 35, 0, 1, 2, 3, 4, 5, 6, 7 };
    /* by access: READ and WRITE as they are, EXEC as that of the exception level */
    static const uint8_t s2_need_of_access[32] = { 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 32, 33, 34, 35,
                                                   0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 32, 33, 34, 35 };
    """
    const uint64_t DESC_VALID "S2_DESC_VALID"
    const uint64_t DESC_TABLE "S2_DESC_TABLE"       # table below level 3, page at level 3
    const uint64_t DESC_S2AP_R "S2_DESC_S2AP_R"
    const uint64_t DESC_S2AP_W "S2_DESC_S2AP_W"
    const uint64_t DESC_AF "S2_DESC_AF"
    const uint64_t DESC_NT "S2_DESC_NT"
    const uint64_t DESC_DBM "S2_DESC_DBM"
    const uint64_t DESC_CONTIGUOUS "S2_DESC_CONT"
    const uint64_t DESC_XN "S2_DESC_XN"
    const uint64_t DESC_TAG "S2_DESC_TAG"
    # Software bit of canonical leaves: the host grants W, also while dirty logging withholds S2AP[1].
    const uint64_t DESC_HOST_W "S2_DESC_HOST_W"
    # Software bit of shadow leaves: L1 maps the page as Device, so HCR_EL2.PTW refuses stage-1 walks there.
    const uint64_t DESC_GUEST_DEVICE "S2_DESC_HOST_W"
    const uint64_t OA_48 "S2_OA_48"
    const uint8_t *PERM_OF_XN_S2AP "s2_perm_of_xn_s2ap"
    const uint8_t *NEED_OF_ACCESS "s2_need_of_access"


cdef inline int level_shift(int granule_bits, int level) noexcept nogil:
    """log2 of the span of one entry."""
    return granule_bits + (granule_bits - 3) * (FINAL_LEVEL - level)


cdef inline uint64_t level_span(int granule_bits, int level) noexcept nogil:
    return (<uint64_t>1) << level_shift(granule_bits, level)


cdef inline int contiguous_bits(int granule_bits, int level) noexcept nogil:
    """log2 of the entries that the contiguous bit joins; 0 where it is ignored (Arm ARM, "Contiguous bit")."""
    if granule_bits == 12:
        return 4 if level >= 1 else 0
    if granule_bits == 14:
        return 7 if level == 3 else 5 if level == 2 else 0
    return 5 if level >= 2 else 0


# Where a descriptor holds its output address. ``wide``: 52 bits, by FEAT_LPA2 (4K, 16K: DS=1) or FEAT_LPA (64K).
ctypedef struct oa_format_t:
    uint64_t mask               # address bits that are in place
    uint64_t high_mask          # address bits that move up by high_shift
    uint8_t high_shift
    uint8_t wide
    uint8_t implies_sh          # no SH[1:0] in a leaf: VTCR_EL2.SH0 says it for all


cdef inline void oa_format_init(oa_format_t *format, int granule_bits, bint wide) noexcept nogil:
    format.mask = OA_48 & ~((<uint64_t>1 << granule_bits) - 1)
    format.high_mask = 0
    format.high_shift = 0
    format.wide = wide
    format.implies_sh = wide and granule_bits != 16
    if format.implies_sh:
        format.mask |= <uint64_t>3 << 48
        format.high_mask = 0x300                    # OA[51:50] in bits 9:8
        format.high_shift = 42
    elif wide:
        format.high_mask = 0xF000                   # OA[51:48] in bits 15:12
        format.high_shift = 36


cdef inline uint64_t decode_oa(const oa_format_t *format, uint64_t desc) noexcept nogil:
    return (desc & format.mask) | (desc & format.high_mask) << format.high_shift


cdef inline uint64_t encode_oa(const oa_format_t *format, uint64_t address) noexcept nogil:
    return (address & format.mask) | (address >> format.high_shift & format.high_mask)


cdef inline uint8_t decode_sh(const oa_format_t *format, uint64_t desc, uint8_t sh0) noexcept nogil:
    return sh0 if format.implies_sh else <uint8_t>(desc >> DESC_SH_SHIFT & 3)


cdef inline int largest_leaf_level(int granule_bits, bint wide) noexcept nogil:
    """Level of the largest block; every level from there to the last may hold leaves."""
    cdef int level = 1 if granule_bits == 12 else 2
    return level - 1 if wide else level


cdef inline int leaf_level_within(int granule_bits, bint wide, uint64_t size) noexcept nogil:
    """Level of the largest leaf that is not above ``size``; the last level if none is."""
    cdef int level = largest_leaf_level(granule_bits, wide)
    while level < FINAL_LEVEL and level_span(granule_bits, level) > size:
        level += 1
    return level


cdef inline uint8_t fault_code(int base, int level) noexcept nogil:
    """FSC with the level folded in; level -1 has codes of its own (EncodeLDFSC)."""
    if level >= 0:
        return <uint8_t>(base + level)
    if base == FSC_ADDRESS_SIZE:
        return 0x29
    if base == FSC_TRANSLATION:
        return 0x2B
    return 0x13


cdef inline uint8_t s2ap_xn_to_perm(uint64_t desc, bint xnx) noexcept nogil:
    """READ/WRITE/EXEC/EXEC_EL0 of a leaf; XN[0] is RES0 without FEAT_XNX."""
    cdef uint64_t index = desc >> DESC_S2AP_SHIFT & 3 | desc >> (DESC_XN_SHIFT - 2) & 0xC
    return PERM_OF_XN_S2AP[index if xnx else index & 0xB]


cdef inline uint64_t perm_to_s2ap_xn(uint8_t perm, bint xnx) noexcept nogil:
    """S2AP and XN bits; without FEAT_XNX execute needs both exception levels."""
    cdef uint64_t bits = (<uint64_t>(perm & 3)) << DESC_S2AP_SHIFT
    cdef uint64_t xn
    cdef uint8_t execute = perm & (ACCESS_EXEC | PERM_EXEC_EL0)
    if execute == (ACCESS_EXEC | PERM_EXEC_EL0):
        xn = 0
    elif execute == 0 or not xnx:
        xn = 2
    elif execute == PERM_EXEC_EL0:
        xn = 1
    else:
        xn = 3
    return bits | xn << DESC_XN_SHIFT


cdef inline uint8_t base_perm(unsigned int code) noexcept nogil:
    """READ/WRITE/EXEC/EXEC_EL0 of a stage-2 base permission (FEAT_S2PIE, S2PIR_EL2). 2, 3, 6 and 7 let the MMU write
    too; that is not a permission of the leaf."""
    cdef uint8_t perm = 0
    if code == 4:
        return ACCESS_WRITE
    if code & 8 or code & 2:
        perm = ACCESS_READ
    if code & 8:
        if code & 4:
            perm |= ACCESS_WRITE
        if code & 2:
            perm |= ACCESS_EXEC
        if code & 1:
            perm |= PERM_EXEC_EL0
    return perm


cdef inline bint mostly_read_only(unsigned int code) noexcept nogil:
    """Base permissions under which only the MMU writes, for its updates of stage-1 tables."""
    return code & 0xA == 2


cdef inline unsigned int base_perm_code(uint64_t s2pir, uint64_t desc) noexcept nogil:
    """The base permission that PIIndex = {54, 53, 51, 6} names."""
    cdef unsigned int index = <unsigned int>(desc >> 53 & 3) << 2 | <unsigned int>(desc >> 51 & 1) << 1
    index |= <unsigned int>(desc >> 6 & 1)
    return <unsigned int>(s2pir >> (4 * index) & 0xF)


cdef inline uint8_t required_perm(uint8_t access) noexcept nogil:
    """The leaf permissions that an access needs, all at once."""
    return NEED_OF_ACCESS[access & 31]


cdef inline bint memattr_is_device(uint8_t memattr, bint fwb) noexcept nogil:
    if fwb:
        return not memattr & 4
    return not memattr & 0xC


cdef inline uint64_t byteswap64(uint64_t value) noexcept nogil:
    value = (value & 0x00FF00FF00FF00FFu) << 8 | (value >> 8) & 0x00FF00FF00FF00FFu
    value = (value & 0x0000FFFF0000FFFFu) << 16 | (value >> 16) & 0x0000FFFF0000FFFFu
    return value << 32 | value >> 32


cdef inline uint64_t hpfar(uint64_t ipa) noexcept nogil:
    """HPFAR_EL2.FIPA: IPA[55:12] in bits 47:4."""
    return ((ipa >> 12) & 0xFFFFFFFFFFFu) << 4
