# Guest leaf x host leaf -> shadow leaf (spec 02, sections 2, 3 and 6). Pure.

from libc.stdint cimport int8_t, uint8_t, uint64_t

from s2shadow.arch cimport oa_format_t
from s2shadow.config cimport features_t
from s2shadow.walker cimport walk_t

# The host's leaf around a cIPA: ``pa`` is that of the aligned block of ``size``.
ctypedef struct host_leaf_t:
    uint64_t pa
    uint64_t size
    uint8_t perm
    uint8_t memattr
    uint8_t sh
    int8_t level                # of the host's tables

# What stays the same for all leaves of a context.
ctypedef struct combine_rules_t:
    oa_format_t oa              # of the host's tables
    uint8_t granule_bits        # of the host
    uint8_t xnx
    uint8_t guest_fwb
    uint8_t host_fwb
    uint8_t guest_cd            # HCR_EL2.CD: L1 makes all Normal memory Non-cacheable
    uint8_t ignore_guest_attributes     # Linux 7.2

ctypedef struct combined_t:
    uint64_t desc
    uint64_t size
    uint8_t perm
    uint8_t memattr
    uint8_t sh
    int8_t guest_level
    int8_t level                # of the shadow leaf

cdef void combine_leaves(const walk_t *guest, const host_leaf_t *host, const combine_rules_t *rules,
                         combined_t *out) noexcept nogil
cdef uint64_t leaf_desc(const oa_format_t *oa, uint64_t pa, int level, uint8_t perm, uint8_t memattr, uint8_t sh,
                        bint xnx) noexcept nogil
cdef void host_oa_format(const features_t *features, oa_format_t *oa) noexcept nogil
