# The C API for Cython: ``from s2shadow cimport s2s_api_t, s2s_import``, compiled with ``s2shadow.get_include()``.
# include/s2shadow/s2shadow.h says what everything means and what may change.

from libc.stdint cimport int8_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "Python.h":        # first: the header then has what needs it
    pass

cdef extern from "s2shadow/s2shadow.h":
    const int S2SHADOW_ABI_MAJOR
    const int S2SHADOW_ABI_MINOR
    const int S2SHADOW_ABI_VERSION
    const char *S2SHADOW_CAPSULE
    const char *S2SHADOW_VM_CAPSULE

    ctypedef struct s2s_vm_t:
        pass

    enum:
        S2S_OK
        S2S_E_INVALID
        S2S_E_NO_MEMORY
        S2S_E_BUSY
        S2S_E_NOT_LOADED
        S2S_E_STATE
        S2S_E_CALLBACK
        S2S_E_UNDEFINED
        S2S_E_BROKEN

    enum:
        S2S_READ
        S2S_WRITE
        S2S_EXEC
        S2S_EL0
        S2S_PTW
        S2S_EXEC_EL0
        S2S_RWX

    enum:
        S2S_HIT
        S2S_MAPPED
        S2S_L1_FAULT
        S2S_HOST_FAULT
        S2S_MMIO
        S2S_RETRY
        S2S_NO_MEMORY
        S2S_MISS

    enum:
        S2S_TEARDOWN_REVERSE_MAP
        S2S_TEARDOWN_INTERVAL_MAP
        S2S_TEARDOWN_BLOW_AWAY
        S2S_TEARDOWN_BLOW_AWAY_LEAN
        S2S_TLBI_EXACT
        S2S_TLBI_KVM72
        S2S_ATTRIBUTES_ARCHITECTURAL
        S2S_ATTRIBUTES_KVM72

    enum:
        S2S_DEVICE_nGnRnE
        S2S_DEVICE_nGnRE
        S2S_DEVICE_nGRE
        S2S_DEVICE_GRE
        S2S_NORMAL_NC
        S2S_NORMAL
        S2S_NORMAL_AS_STAGE1

    enum:
        S2S_PARTIAL_DEFAULT
        S2S_PARTIAL_SPLIT
        S2S_PARTIAL_DROP

    enum:
        S2S_POPULATE_NONE
        S2S_POPULATE_LINEAR
        S2S_POPULATE_CALLBACK

    enum:
        S2S_HW_VMALLS12
        S2S_HW_IPA
        S2S_HW_VA
        S2S_HW_ASID
        S2S_HW_VMALL
        S2S_HW_ALL
        S2S_HW_VAA

    enum:
        S2S_CAS_DONE
        S2S_CAS_LOST
        S2S_CAS_REFUSED

    const uint32_t S2S_READONLY
    const uint64_t S2S_DEFAULT
    const uint64_t S2S_HCR_VM
    const uint64_t S2S_HCR_PTW
    const uint64_t S2S_HCR_DC
    const uint64_t S2S_HCR_CD
    const uint64_t S2S_HCR_FWB

    ctypedef struct s2s_features_t:
        uint32_t size
        uint8_t pa_bits
        uint8_t granules
        uint8_t host_granule_bits
        uint8_t vmid_bits
        uint8_t hafdbs
        uint8_t ttl
        uint8_t range
        uint8_t xnx
        uint8_t fwb
        uint8_t lpa2
        uint8_t lpa
        uint8_t ttst
        uint8_t tlbios
        uint8_t xs
        uint8_t bbm
        uint8_t s2pie

    ctypedef struct s2s_options_t:
        uint32_t size
        uint32_t vcpus
        uint32_t contexts
        uint8_t teardown
        uint8_t tlbi
        uint8_t attributes
        uint8_t track_tlbis
        uint64_t max_table_bytes
        uint64_t table_base
        const s2s_features_t *features

    ctypedef struct s2s_registers_t:
        uint32_t size
        uint32_t big_endian
        uint64_t vttbr
        uint64_t vtcr
        uint64_t hcr
        uint64_t s2pir

    ctypedef struct s2s_mapping_t:
        uint32_t size
        uint8_t perm
        uint8_t memattr
        uint64_t pa
        uint64_t block

    ctypedef int (*s2s_populate_fn)(void *opaque, uint64_t cipa, uint32_t access,
                                    s2s_mapping_t *mapping) noexcept nogil

    ctypedef struct s2s_populate_t:
        uint32_t size
        uint32_t policy
        int64_t offset
        uint64_t max_block
        uint32_t fresh
        s2s_populate_fn callback
        void *opaque

    ctypedef struct s2s_memory_ops_t:
        uint32_t size
        int (*read)(void *opaque, uint64_t cipa, uint64_t *word) noexcept nogil
        int (*cas)(void *opaque, uint64_t cipa, uint64_t *expected, uint64_t desired) noexcept nogil

    ctypedef struct s2s_stats_t:
        uint32_t size
        uint64_t faults, hits, mapped, l1_faults, host_faults, mmio, retries, no_memory
        uint64_t installed, removed, relaxed, replaced, narrowed, live
        uint64_t invalidations, kernel_steps, unknown_unmaps, contexts_recycled, evictions
        uint64_t host_leaves, table_bytes, link_bytes, rmap_bytes
        uint64_t owed_tlbis

    ctypedef struct s2s_fault_t:
        uint8_t kind
        uint8_t fsc
        int8_t level
        uint8_t perm
        uint16_t context
        uint64_t ipa, cipa, pa
        uint64_t size
        uint64_t hpfar

    ctypedef struct s2s_walk_t:
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

    ctypedef struct s2s_hw_tlbi_t:
        uint64_t seq
        uint8_t op
        uint16_t host_vmid
        uint64_t start, end
        int8_t level
        uint16_t asid
        uint8_t last_level

    ctypedef struct s2s_change_t:
        uint64_t leaves
        uint64_t ticket

    ctypedef struct s2s_tlbi_result_t:
        uint64_t removed
        uint64_t required
        uint64_t contexts

    ctypedef struct s2s_api_t:
        uint32_t size
        uint32_t abi_version
        const char *(*status_text)(int status) noexcept nogil
        const char *(*last_error)() noexcept nogil
        void (*features_init)(s2s_features_t *features, size_t size) noexcept nogil
        void (*options_init)(s2s_options_t *options, size_t size) noexcept nogil
        int (*create)(const s2s_options_t *options, s2s_vm_t **vm) noexcept nogil
        void (*destroy)(s2s_vm_t *vm) noexcept nogil
        int (*add_ram)(s2s_vm_t *vm, uint64_t cipa, uint64_t size, void *host, uint32_t flags) noexcept nogil
        int (*add_device)(s2s_vm_t *vm, uint64_t cipa, uint64_t size) noexcept nogil
        int (*add_callbacks)(s2s_vm_t *vm, uint64_t cipa, uint64_t size, const s2s_memory_ops_t *ops, void *opaque,
                             uint32_t flags) noexcept nogil
        int (*remove_region)(s2s_vm_t *vm, uint64_t cipa, s2s_change_t *change) noexcept nogil
        int (*load)(s2s_vm_t *vm, uint32_t vcpu, const s2s_registers_t *registers, uint32_t *context) noexcept nogil
        int (*put)(s2s_vm_t *vm, uint32_t vcpu) noexcept nogil
        int (*fault)(s2s_vm_t *vm, uint32_t vcpu, uint64_t ipa, uint32_t access, s2s_fault_t *out) noexcept nogil
        int (*translate)(s2s_vm_t *vm, uint32_t vcpu, uint64_t ipa, uint32_t access, s2s_fault_t *out) noexcept nogil
        int (*walk)(s2s_vm_t *vm, uint32_t vcpu, uint64_t ipa, uint32_t access, int update,
                    s2s_walk_t *out) noexcept nogil
        int (*fault_many)(s2s_vm_t *vm, uint32_t vcpu, const uint64_t *ipas, const uint8_t *access,
                          size_t access_stride, s2s_fault_t *out, size_t n, size_t *done) noexcept nogil
        int (*translate_many)(s2s_vm_t *vm, uint32_t vcpu, const uint64_t *ipas, const uint8_t *access,
                              size_t access_stride, s2s_fault_t *out, size_t n) noexcept nogil
        int (*tlbi)(s2s_vm_t *vm, uint32_t vcpu, uint32_t insn, uint64_t xt, const s2s_registers_t *registers,
                    s2s_tlbi_result_t *result) noexcept nogil
        int (*host_map)(s2s_vm_t *vm, uint64_t cipa, uint64_t pa, uint64_t size, uint32_t perm, uint32_t memattr,
                        s2s_change_t *change) noexcept nogil
        int (*host_unmap)(s2s_vm_t *vm, uint64_t start, uint64_t end, uint32_t partial,
                          s2s_change_t *change) noexcept nogil
        int (*host_protect)(s2s_vm_t *vm, uint64_t start, uint64_t end, uint32_t perm,
                            s2s_change_t *change) noexcept nogil
        int (*set_populate)(s2s_vm_t *vm, const s2s_populate_t *populate) noexcept nogil
        int (*log_dirty)(s2s_vm_t *vm, uint64_t start, uint64_t end, int on, s2s_change_t *change) noexcept nogil
        int (*dirty_log)(s2s_vm_t *vm, uint64_t start, uint64_t end, uint8_t *bitmap, size_t bytes) noexcept nogil
        int (*age)(s2s_vm_t *vm, uint64_t start, uint64_t end, uint8_t *bitmap, size_t bytes) noexcept nogil
        int (*test_young)(s2s_vm_t *vm, uint64_t start, uint64_t end, uint8_t *bitmap, size_t bytes) noexcept nogil
        int (*take_tlbis)(s2s_vm_t *vm, s2s_hw_tlbi_t *rows, size_t limit, size_t *taken) noexcept nogil
        int (*stats)(s2s_vm_t *vm, s2s_stats_t *stats) noexcept nogil
        int (*check)(s2s_vm_t *vm) noexcept nogil

    # Both need the GIL. NULL comes with an exception set.
    const s2s_api_t *s2s_import() except NULL
    s2s_vm_t *s2s_from_python(object nested_vm) except NULL
