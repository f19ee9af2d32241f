# Stage-2 configuration: VTTBR_EL2, VTCR_EL2 and HCR_EL2 decoded once, so that a walk only reads fields.

from libc.stdint cimport int8_t, uint8_t, uint16_t, uint32_t, uint64_t

from s2shadow.arch cimport oa_format_t

ctypedef struct features_t:
    uint8_t pa_bits
    uint8_t granules            # bit 0: 4K, bit 1: 16K, bit 2: 64K
    uint8_t hafdbs
    uint8_t vmid16
    uint8_t xnx
    uint8_t fwb
    uint8_t lpa2
    uint8_t lpa
    uint8_t ttst
    uint8_t bbm
    uint8_t s2pie
    uint8_t host_granule_bits
    uint8_t ttl
    uint8_t range
    uint8_t tlbios
    uint8_t xs

ctypedef struct s2_config_t:
    uint64_t base               # of the start table, aligned to its size
    oa_format_t oa
    uint64_t output_mask        # the output addresses that PS and the features allow
    uint64_t plain_mask         # bits of a descriptor that tell its type, or an address out of range or not in place
    uint64_t index_mask         # of an entry in a table below the start,
    uint64_t entry_mask         # the same in bytes
    uint64_t leaf_mask          # plain_mask, AF and the contiguous bit
    uint64_t perm_mask          # of XN << 2 | S2AP: the bits that count
    uint64_t sh_mask            # SH[1:0] in a leaf, or 0 where SH0 is implied,
    uint64_t sh_implied         # which is this, in the same place
    uint64_t walk_vtcr          # the VTCR bits that change a walk, others zero: part of the context key
    uint64_t s2pir
    int stride                  # log2 of the entries of a table
    uint16_t vmid
    uint8_t enabled             # HCR_EL2.VM or HCR_EL2.DC
    uint8_t walkable            # stage 2 is on and its configuration legal
    uint8_t plain               # and there is no rule but type, AF, output size and S2AP/XN: the walker's short way
    uint8_t granule_bits
    uint8_t shifts[5]           # log2 of the span of an entry, by level + 1
    uint8_t start_shift         # log2 of the span of an entry of the start table
    uint8_t ia_bits
    uint8_t oa_bits
    uint8_t pa_bits
    int8_t start_level
    int8_t block_level          # of the largest block
    uint8_t concatenated_bits   # log2 of the start tables side by side
    uint8_t has_error
    uint8_t error_fsc
    uint8_t big_endian
    uint8_t ha
    uint8_t hd
    uint8_t ds
    uint8_t s2pie
    uint8_t sh0
    uint8_t xnx
    uint8_t fwb
    uint8_t cd
    uint8_t ptw
    uint8_t bbm

cdef void decode_config(const features_t *features, uint64_t vttbr, uint64_t vtcr, uint64_t hcr,
                        bint big_endian, uint64_t s2pir, s2_config_t *config) noexcept nogil
cdef int fill_features(object features, features_t *out) except -1
cdef str fault_text(uint8_t fsc)


cdef inline uint16_t decode_vmid(const features_t *features, uint64_t vttbr, uint64_t vtcr) noexcept nogil:
    """VTTBR.VMID; the upper byte counts only with FEAT_VMID16 and VTCR.VS."""
    cdef uint16_t vmid = <uint16_t>(vttbr >> 48)
    if not (features.vmid16 and vtcr >> 19 & 1):
        vmid &= 0xFF
    return vmid


cdef class Stage2Config:
    cdef s2_config_t c
    cdef readonly object features
    cdef readonly uint64_t vttbr
    cdef readonly uint64_t vtcr
    cdef readonly uint64_t hcr
