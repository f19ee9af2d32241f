# Checked conversion of arguments at the Python border.

from libc.stdint cimport uint64_t


cdef inline uint64_t as_u64(object value, str name) except? 0:
    """A 64-bit unsigned value; ``ValueError`` out of range, ``TypeError`` for what is no integer, naming ``name``."""
    if not isinstance(value, int):
        try:
            value = value.__index__()
        except AttributeError:
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    try:
        return value
    except OverflowError:
        raise ValueError(f"{name} must be between 0 and 2^64 - 1, got {value}") from None
