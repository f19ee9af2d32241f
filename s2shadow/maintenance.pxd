# L1's TLB maintenance applied to the shadows (spec 03, section 3).

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from s2shadow.vm cimport vm_t

ctypedef enum scope_t:
    SCOPE_ALL                   # every context of the VM
    SCOPE_VMID                  # contexts with the VMID, stage 2 on or off
    SCOPE_IPA                   # contexts with the VMID and stage 2 on, by the extent rule

ctypedef struct maintenance_t:
    scope_t scope
    uint16_t vmid
    uint8_t levels              # SCOPE_IPA: guest levels that the hint allows, bit level + 2
    uint8_t granule_bits        # SCOPE_IPA: of the hint, 0 for none
    uint64_t start
    uint64_t end
    uint64_t removed            # out
    uint32_t visited            # out: contexts that the operation named

cdef void apply_maintenance(vm_t *vm, maintenance_t *operation) noexcept nogil
