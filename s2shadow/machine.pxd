# One machine without Python: set-up and teardown of a ``vm_t``, and what NestedVM and the C API do with one alike.

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from s2shadow.config cimport features_t, s2_config_t
from s2shadow.host cimport host_attrs_t
from s2shadow.memory cimport region_map_t
from s2shadow.vm cimport range_t, teardown_t, vcpu_t, vm_t

# What a machine is made of; checked by whoever asks for it.
ctypedef struct plan_t:
    features_t features
    uint32_t vcpus
    uint32_t contexts
    teardown_t teardown
    uint64_t max_bytes          # beyond the roots; 0: no bound
    uint64_t table_base
    uint8_t ignore_guest_attributes
    uint8_t tlbi_kvm72
    uint8_t track_tlbis

ctypedef enum setup_t:
    SETUP_DONE
    SETUP_NO_ADDRESS_SPACE      # for the arena
    SETUP_NO_MEMORY
    SETUP_NO_ROOTS              # the arena is too small for the roots of so many contexts

# Sums over the vCPUs, and what is counted on the exclusive side.
ctypedef struct counters_t:
    uint64_t kinds[8]
    uint64_t faults
    uint64_t installed
    uint64_t removed
    uint64_t relaxed
    uint64_t replaced
    uint64_t narrowed
    uint64_t live
    uint64_t invalidations
    uint64_t kernel_steps
    uint64_t unknown_unmaps
    uint64_t recycled
    uint64_t evictions
    uint64_t host_leaves
    uint64_t table_bytes
    uint64_t link_bytes
    uint64_t rmap_bytes
    uint64_t owed

cdef setup_t vm_init(vm_t *vm, const plan_t *plan) noexcept nogil
cdef void vm_destroy(vm_t *vm) noexcept nogil
cdef uint64_t default_table_base(uint64_t pa_bits) noexcept nogil
cdef uint64_t root_bytes(uint64_t host_granule, uint64_t contexts) noexcept nogil
cdef uint64_t least_bytes(uint64_t host_granule, uint64_t vcpus, uint64_t contexts) noexcept nogil
cdef void vcpu_load(vm_t *vm, vcpu_t *vcpu, const s2_config_t *config, uint64_t vttbr, uint64_t vtcr,
                    uint64_t hcr) noexcept nogil
cdef void vcpu_put(vm_t *vm, vcpu_t *vcpu) noexcept nogil
cdef bint install_populated(vm_t *vm, uint64_t cipa, uint64_t pa, uint64_t size, const host_attrs_t *attrs,
                            uint64_t seq) noexcept nogil
cdef uint32_t ram_within(const region_map_t *map, uint64_t page, uint64_t start, uint64_t end,
                         range_t *out) noexcept nogil
cdef void vm_counters(vm_t *vm, counters_t *out) noexcept nogil
