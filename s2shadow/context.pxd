# The pool of shadow contexts (spec 04, sections 2 and 3).

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from s2shadow.config cimport s2_config_t
from s2shadow.vm cimport context_t, vcpu_t, vm_t

cdef uint32_t context_acquire(vm_t *vm, const s2_config_t *config, uint64_t vttbr, uint64_t vtcr) noexcept nogil
cdef void context_release(vm_t *vm, uint32_t index) noexcept nogil
cdef bint same_key(const s2_config_t *a, const s2_config_t *b) noexcept nogil
cdef uint64_t context_entries(const vm_t *vm, const context_t *context) noexcept nogil
cdef uint64_t context_table_bytes(const vm_t *vm, const context_t *context) noexcept nogil
