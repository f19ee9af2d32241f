# TLBI decoding: (operation, operand) -> what it names. Pure.

from libc.stdint cimport int8_t, uint8_t, uint16_t, uint32_t, uint64_t

from libc.string cimport memset

from s2shadow.config cimport features_t

ctypedef enum tlbi_regime_t:
    REGIME_EL10_S1
    REGIME_EL2_S1
    REGIME_EL10_S2
    REGIME_EL10_S12

ctypedef enum tlbi_scope_t:
    SCOPE_VMALL
    SCOPE_VA
    SCOPE_VAA
    SCOPE_ASID
    SCOPE_IPA
    SCOPE_ALL
    SCOPE_VMALLS12

# What operations are counted under.
ctypedef enum tlbi_class_t:
    CLASS_IPA
    CLASS_RANGE
    CLASS_VMALLS12
    CLASS_ALL
    CLASS_STAGE1

ctypedef enum tlbi_need_t:
    NEED_OS = 1
    NEED_RANGE = 2
    NEED_XS = 4

ctypedef enum tlbi_status_t:
    TLBI_OK
    TLBI_UNDEFINED              # no such operation
    TLBI_FEATURE                # the features lack it

cdef enum:
    NO_LEVEL = -2               # no level hint

ctypedef struct tlbi_op_t:
    uint8_t known
    uint8_t regime
    uint8_t scope
    uint8_t is_range
    uint8_t last_level
    uint8_t shareability        # 0 NSH, 1 IS, 2 OS
    uint8_t nxs
    uint8_t needs               # tlbi_need_t
    uint8_t takes_operand
    uint8_t takes_asid
    uint8_t kind                # tlbi_class_t

ctypedef struct tlbi_t:
    const tlbi_op_t *op
    uint8_t names_nothing       # a range with TG=00, or an address beyond the input size
    uint8_t granule_bits        # of the hint, or of the range; 0 for none
    int8_t level                # of the hint, or NO_LEVEL
    uint8_t ttl                 # as in the operand, 4 bits (2 for a range)
    uint16_t asid
    uint64_t start
    uint64_t end

cdef tlbi_status_t tlbi_lookup(uint32_t op1, uint32_t crn, uint32_t crm, uint32_t op2, const features_t *features,
                               tlbi_op_t *op) noexcept nogil
cdef tlbi_status_t tlbi_lookup_word(uint32_t word, const features_t *features, tlbi_op_t *op) noexcept nogil
cdef void tlbi_decode(const tlbi_op_t *op, uint64_t xt, const features_t *features, uint64_t vtcr, bint kvm72,
                      tlbi_t *out) noexcept nogil
cdef object tlbi_encoding(object op, const features_t *features)


cdef inline void tlbi_no_operand(const tlbi_op_t *op, tlbi_t *out) noexcept nogil:
    """Decode an operation that takes no operand."""
    memset(out, 0, sizeof(tlbi_t))
    out.op = op
    out.level = NO_LEVEL
