# L1's TLB maintenance applied to the shadows (spec 03, sections 3 and 5).

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from s2shadow.tlbi cimport tlbi_op_t
from s2shadow.vm cimport vm_t

# The state under which L1 issued an operation.
ctypedef struct tlbi_regs_t:
    uint64_t vttbr
    uint64_t vtcr
    uint64_t hcr

ctypedef struct tlbi_result_t:
    uint64_t removed
    uint64_t required           # of the removed: those that the exact rule names
    uint32_t contexts           # that the operation named
    uint64_t pause_at           # what ``removed`` may come to in this exclusive section

cdef void apply_tlbi(vm_t *vm, const tlbi_op_t *op, uint64_t xt, const tlbi_regs_t *regs,
                     tlbi_result_t *result) noexcept nogil
