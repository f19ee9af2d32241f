# What an ``s2s_vm_t`` of the C API is: a machine, the memory that it sees, and whom it asks.

from libc.stdint cimport uint32_t

from s2shadow cimport s2s_populate_fn
from s2shadow.memory cimport answers_t, memory_t
from s2shadow.vm cimport vm_t

ctypedef struct handle_t:
    vm_t *vm
    const memory_t *shared      # the GuestMemory of a NestedVM, whose vCPUs follow it; NULL: ``own`` counts
    memory_t own                # changes on the exclusive side, together with what every vCPU knows of it
    answers_t *answers          # by vCPU; NULL where all memory is ours
    uint32_t callback_regions
    s2s_populate_fn populate    # of POPULATE_CALLABLE; NULL: the callable is Python's
    void *populate_opaque
