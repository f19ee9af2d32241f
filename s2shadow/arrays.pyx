"""Arrays at the Python border (see arrays.pxd). Each function returns the array that holds what it found: keep it."""

import numpy as np

cimport numpy as cnp
from cpython.ref cimport Py_INCREF

from s2shadow.arguments cimport as_u64

cdef extern from "numpy/arrayobject.h":
    object PyArray_Empty(int nd, cnp.npy_intp *dims, cnp.dtype dtype, int fortran)     # keeps the reference to dtype

cnp.import_array()


cdef inline bint are_addresses(object array):
    """Whether an array is a vector of uint64 that C can read as it is."""
    return (cnp.PyArray_Check(array) and cnp.PyArray_TYPE(array) == cnp.NPY_UINT64 and cnp.PyArray_NDIM(array) == 1
            and cnp.PyArray_ISCARRAY_RO(array))


cdef object take_addresses(object ipas, batch_t *batch):
    """A C-contiguous uint64 vector, without a copy where possible."""
    if not are_addresses(ipas):
        ipas = as_addresses(ipas)
    batch.ipas = <const uint64_t *>cnp.PyArray_DATA(ipas)
    batch.n = cnp.PyArray_DIM(ipas, 0)
    return ipas


cdef object take_masks(object access, batch_t *batch):
    """Access masks, one for all or one for each of ``batch.n``."""
    batch.stride = 0
    batch.masks = &batch.mask
    if isinstance(access, int):
        batch.mask = as_access(access)
        return None
    array = np.asarray(access)
    if array.ndim == 0:
        batch.mask = as_access(access)
        return None
    array = as_masks(array, batch.n)
    batch.stride = 1
    batch.masks = <const uint8_t *>cnp.PyArray_DATA(array)
    return array


cdef object take_output(object out, object dtype, batch_t *batch, void **rows):
    """``out`` checked, or a new array of ``dtype``, for ``batch.n`` elements."""
    cdef cnp.npy_intp n = batch.n
    if out is None:
        Py_INCREF(dtype)                # the new array's
        out = PyArray_Empty(1, &n, <cnp.dtype>dtype, 0)
    elif not (cnp.PyArray_Check(out) and <void *>cnp.PyArray_DESCR(out) == <void *>dtype
              and cnp.PyArray_NDIM(out) == 1 and cnp.PyArray_DIM(out, 0) == n and cnp.PyArray_ISCARRAY(out)):
        check_output(out, dtype, n)
    rows[0] = cnp.PyArray_DATA(out)
    return out


def as_addresses(ipas):
    """A C-contiguous uint64 vector, without a copy where possible."""
    array = np.asarray(ipas)
    if array.dtype != np.uint64:
        if array.size and array.dtype.kind not in "ui":
            raise TypeError(f"ipas must be integers, got {array.dtype}")
        if array.dtype.kind == "i" and array.size and array.min() < 0:
            raise ValueError("ipas must not be negative")
        array = array.astype(np.uint64)
    if array.ndim != 1:
        raise ValueError(f"ipas must be one-dimensional, got {array.ndim} dimensions")
    return np.require(array, np.uint64, "CA")


cdef uint8_t as_access(object access) except? 0xFF:
    """One access mask, checked."""
    cdef uint64_t mask = as_u64(access, "access")
    if mask > 31:
        raise ValueError(f"access must be made of READ, WRITE, EXEC, EL0 and PTW, got {mask:#x}")
    return <uint8_t>mask


def as_masks(array, n):
    """A uint8 vector of ``n`` access masks."""
    if array.shape != (n,):
        raise ValueError(f"access must be one mask or have the length of ipas ({n}), got shape {array.shape}")
    if array.dtype.kind not in "ui":
        raise TypeError(f"access must be integers, got {array.dtype}")
    if array.size and (array.min() < 0 or array.max() > 31):
        raise ValueError("access must be made of READ, WRITE, EXEC, EL0 and PTW")
    return np.ascontiguousarray(array, dtype=np.uint8)


def check_output(out, dtype, n):
    """Raise for what is no array to write ``n`` rows of ``dtype`` into."""
    if not isinstance(out, np.ndarray) or out.dtype != dtype:
        raise TypeError(f"out must be an array of {dtype}")
    if out.shape != (n,) or not out.flags.carray:
        raise ValueError(f"out must be a writable C-contiguous array of {n} elements, got shape {out.shape}")
