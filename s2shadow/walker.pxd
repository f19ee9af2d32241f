# One stage-2 translation of L1's tables: (memory, config, ipa, access) -> walk_t. No engine state.

from libc.stdint cimport int64_t, int8_t, uint8_t, uint64_t

from s2shadow.config cimport s2_config_t
from s2shadow.memory cimport mem_view_t

# The layout of WALK_DTYPE: batches are written straight into the user's array.
ctypedef struct walk_t:
    uint8_t status
    uint8_t fsc
    int8_t level
    uint8_t perm
    uint8_t memattr
    uint8_t sh
    uint8_t contiguous
    uint8_t updated
    uint64_t pa
    uint64_t size
    uint64_t desc
    uint64_t desc_addr

# What a walk wants next: a descriptor's value, or a compare-and-swap of one.
ctypedef enum request_t:
    WALK_DONE
    WALK_READ
    WALK_SWAP

# A walk under way. Descriptor values are in host byte order.
ctypedef struct walk_state_t:
    uint64_t ipa
    uint64_t address            # of the descriptor that is wanted
    uint64_t expected           # WALK_SWAP: what it must still hold,
    uint64_t desired            # and what it shall hold then
    int level
    int shift
    uint8_t access
    uint8_t update

# The way of the last walk down L1's tables, for the next one that shares a part of it.
ctypedef struct walk_path_t:
    uint64_t ipa
    uint64_t entries[5]         # address of the entry that was read at each level, by level + 1
    int8_t level                # the deepest table that is known; the start level: none

cdef enum:
    WALKS_TOGETHER = 64         # a core has fewer lines on their way; more only wait less often for the first

# Walks side by side: the entries that they are at.
ctypedef struct walks_t:
    const uint64_t *entries[WALKS_TOGETHER]     # in the host's memory; of a walk that found none, a zero
    uint64_t addresses[WALKS_TOGETHER]
    int8_t levels[WALKS_TOGETHER]

cdef bint look_ahead(mem_view_t *view, const s2_config_t *config, const uint64_t *ipas, int64_t n,
                     walks_t *walks) noexcept nogil
cdef void walk_run(mem_view_t *view, const s2_config_t *config, const uint64_t *ipas, const uint8_t *masks,
                   int64_t stride, bint update, walk_t *out, int64_t n) noexcept nogil
cdef void walk_remembering(mem_view_t *view, const s2_config_t *config, walk_path_t *path, uint64_t ipa,
                           uint8_t access, walk_t *out) noexcept nogil
cdef void walk_stage2(mem_view_t *view, const s2_config_t *config, uint64_t ipa, uint8_t access,
                      bint update, walk_t *out) noexcept nogil


cdef class Walk:
    cdef walk_t c
    cdef readonly uint64_t ipa
    cdef tuple trace                # of WalkLevel, or None
