# Arrays at the Python border: taken as they are where they fit, so that a batch of one costs little more than a call.

from libc.stdint cimport int64_t, uint8_t, uint64_t

# What a batch works on; ``mask`` stands for all where ``stride`` is 0. Good while the batch_t's owner holds the arrays.
ctypedef struct batch_t:
    const uint64_t *ipas
    const uint8_t *masks
    int64_t stride
    int64_t n
    uint8_t mask

cdef object take_addresses(object ipas, batch_t *batch)
cdef object take_masks(object access, batch_t *batch)
cdef object take_output(object out, object dtype, batch_t *batch, void **rows)
cdef uint8_t as_access(object access) except? 0xFF
