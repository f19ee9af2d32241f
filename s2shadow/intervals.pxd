# The interval map: what the 2026 proposal for Linux keeps for each shadow context in place of a reverse map
# (Wei-Lin Chang, "KVM: arm64: nv: Implement nested stage-2 reverse map", v3).
#
# Two ordered maps. ``ranges``: canonical range -> the one nested range that maps it, or UNKNOWN. A mapping whose
# canonical range overlaps any that is there makes one UNKNOWN range of them all, and what they were mapped at is
# forgotten. ``starts``: nested address -> canonical start of its known range, so that a leaf that goes takes its
# range along. A leaf under an UNKNOWN range leaves the range as it is: nothing says what else it stands for.
#
# Recording runs on the shared side and takes the context's mutex; everything else runs on the exclusive side. Order of
# locks: the VM's, the slot's (DESC_LOCKED), the mutex. A NULL map is that of a policy without one: it holds nothing.

from libc.stdint cimport uint64_t

from s2shadow.table cimport arena_t

cdef extern from *:
    """
    #include <stdint.h>
    #define S2_UNKNOWN_IPA UINT64_MAX       /* where no leaf starts */
    """
    const uint64_t UNKNOWN_IPA "S2_UNKNOWN_IPA"

cdef struct intervals_t                     # C++ inside: only intervals.pyx looks in

ctypedef struct interval_t:
    uint64_t start                          # cIPA
    uint64_t end
    uint64_t ipa                            # what maps ``start``, or UNKNOWN_IPA

cdef intervals_t *intervals_new(arena_t *arena) noexcept nogil
cdef void intervals_free(intervals_t *maps) noexcept nogil
cdef bint intervals_record(intervals_t *maps, uint64_t cipa, uint64_t size, uint64_t ipa) noexcept nogil
cdef void intervals_remove(intervals_t *maps, uint64_t ipa) noexcept nogil
cdef bint intervals_find(intervals_t *maps, uint64_t start, uint64_t end, interval_t *out) noexcept nogil
cdef void intervals_lose(intervals_t *maps) noexcept nogil
cdef void intervals_reset(intervals_t *maps) noexcept nogil
cdef bint intervals_empty(const intervals_t *maps) noexcept nogil
cdef uint64_t intervals_bytes(const intervals_t *maps) noexcept nogil
cdef uint64_t intervals_start_of(intervals_t *maps, uint64_t ipa) noexcept nogil
cdef uint64_t intervals_known(const intervals_t *maps) noexcept nogil
