# The fault path.

from libc.stdint cimport int64_t, uint8_t, uint64_t

from s2shadow.vm cimport fault_t, vcpu_t, vm_t

ctypedef enum step_t:
    STEP_DONE
    STEP_EXCLUSIVE              # again, on the exclusive side
    STEP_POPULATE               # the embedder must be asked for a mapping of ``out.cipa``
    STEP_DESCRIPTOR             # or for a descriptor of memory that is its own

cdef void translate_run(vm_t *vm, vcpu_t *vcpu, const uint64_t *ipas, const uint8_t *masks, int64_t stride,
                        fault_t *out, int64_t n) noexcept nogil
cdef step_t fault_one(vm_t *vm, vcpu_t *vcpu, uint64_t ipa, uint8_t access, fault_t *out) noexcept nogil
cdef step_t fault_run(vm_t *vm, vcpu_t *vcpu, const uint64_t *ipas, const uint8_t *masks, int64_t stride,
                      fault_t *out, int64_t n, int64_t *at) noexcept nogil
