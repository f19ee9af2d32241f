# Every invariant of the design page, verified by brute force.

from libc.stdint cimport uint32_t, uint64_t

from s2shadow.memory cimport mem_view_t
from s2shadow.vm cimport vm_t

ctypedef struct finding_t:
    int rule                    # 0: all hold; else an index into RULES
    uint32_t slot               # where
    uint64_t seen
    uint64_t wanted

cdef void check_vm(vm_t *vm, mem_view_t *view, finding_t *finding) noexcept nogil
