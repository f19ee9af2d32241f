"""The C API's table by ctypes, for tests: functions by name, a VM with the interface of the Python one where it has it.

What is declared here is what ``s2shadow.h`` says; ``test_capi_header`` holds the two against each other.
"""

import ctypes
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_int,
    c_int8,
    c_int64,
    c_size_t,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)

import numpy as np

import s2shadow as s2

OK, INVALID, REFUSED_MEMORY, BUSY, NOT_LOADED, STATE, CALLBACK, UNDEFINED, BROKEN = 0, -1, -2, -3, -4, -5, -6, -7, -8
CAS_DONE, CAS_LOST, CAS_REFUSED = 0, 1, 2
READONLY = 1
POPULATE_NONE, POPULATE_LINEAR, POPULATE_CALLBACK = 0, 1, 2


class Sized(Structure):
    """A struct that starts with its size, which is set."""

    def __init__(self, **fields):
        super().__init__(size=ctypes.sizeof(type(self)), **fields)


class Features(Sized):
    _fields_ = [("size", c_uint32), *((name, c_uint8) for name in (
        "pa_bits", "granules", "host_granule_bits", "vmid_bits", "hafdbs", "ttl", "range", "xnx", "fwb", "lpa2", "lpa",
        "ttst", "tlbios", "xs", "bbm", "s2pie"))]


class Options(Sized):
    _fields_ = [("size", c_uint32), ("vcpus", c_uint32), ("contexts", c_uint32), ("teardown", c_uint8),
                ("tlbi", c_uint8), ("attributes", c_uint8), ("track_tlbis", c_uint8), ("max_table_bytes", c_uint64),
                ("table_base", c_uint64), ("features", POINTER(Features))]


class Registers(Sized):
    _fields_ = [("size", c_uint32), ("big_endian", c_uint32), ("vttbr", c_uint64), ("vtcr", c_uint64),
                ("hcr", c_uint64), ("s2pir", c_uint64)]


class Mapping(Sized):
    _fields_ = [("size", c_uint32), ("perm", c_uint8), ("memattr", c_uint8), ("reserved", c_uint8 * 2),
                ("pa", c_uint64), ("block", c_uint64)]


POPULATE_FN = ctypes.CFUNCTYPE(c_int, c_void_p, c_uint64, c_uint32, POINTER(Mapping))
READ_FN = ctypes.CFUNCTYPE(c_int, c_void_p, c_uint64, POINTER(c_uint64))
CAS_FN = ctypes.CFUNCTYPE(c_int, c_void_p, c_uint64, POINTER(c_uint64), c_uint64)


class Populate(Sized):
    _fields_ = [("size", c_uint32), ("policy", c_uint32), ("offset", c_int64), ("max_block", c_uint64),
                ("fresh", c_uint32), ("reserved", c_uint32), ("callback", POPULATE_FN), ("opaque", c_void_p)]


class MemoryOps(Sized):
    _fields_ = [("size", c_uint32), ("reserved", c_uint32), ("read", READ_FN), ("cas", CAS_FN)]


STATS = ("faults hits mapped l1_faults host_faults mmio retries no_memory installed removed relaxed replaced narrowed "
         "live invalidations kernel_steps unknown_unmaps contexts_recycled evictions host_leaves table_bytes "
         "link_bytes rmap_bytes owed_tlbis").split()


class Stats(Sized):
    _fields_ = [("size", c_uint32), ("reserved", c_uint32), *((name, c_uint64) for name in STATS)]


class Fault(Structure):
    _fields_ = [("kind", c_uint8), ("fsc", c_uint8), ("level", c_int8), ("perm", c_uint8), ("context", c_uint16),
                ("ipa", c_uint64), ("cipa", c_uint64), ("pa", c_uint64), ("size", c_uint64), ("hpfar", c_uint64)]


class Walk(Structure):
    _fields_ = [("status", c_uint8), ("fsc", c_uint8), ("level", c_int8), ("perm", c_uint8), ("memattr", c_uint8),
                ("sh", c_uint8), ("contiguous", c_uint8), ("updated", c_uint8), ("pa", c_uint64), ("size", c_uint64),
                ("desc", c_uint64), ("desc_addr", c_uint64)]


class HwTlbi(Structure):
    _fields_ = [("seq", c_uint64), ("op", c_uint8), ("host_vmid", c_uint16), ("start", c_uint64), ("end", c_uint64),
                ("level", c_int8), ("asid", c_uint16), ("last_level", c_uint8)]


class Change(Structure):
    _fields_ = [("leaves", c_uint64), ("ticket", c_uint64)]


class TlbiResult(Structure):
    _fields_ = [("removed", c_uint64), ("required", c_uint64), ("contexts", c_uint64)]


Vm = c_void_p
BITMAP = [Vm, c_uint64, c_uint64, c_void_p, c_size_t]
FUNCTIONS = {
    "status_text": (c_char_p, [c_int]),
    "last_error": (c_char_p, []),
    "features_init": (None, [c_void_p, c_size_t]),
    "options_init": (None, [c_void_p, c_size_t]),
    "create": (c_int, [c_void_p, POINTER(Vm)]),
    "destroy": (None, [Vm]),
    "add_ram": (c_int, [Vm, c_uint64, c_uint64, c_void_p, c_uint32]),
    "add_device": (c_int, [Vm, c_uint64, c_uint64]),
    "add_callbacks": (c_int, [Vm, c_uint64, c_uint64, c_void_p, c_void_p, c_uint32]),
    "remove_region": (c_int, [Vm, c_uint64, POINTER(Change)]),
    "load": (c_int, [Vm, c_uint32, c_void_p, POINTER(c_uint32)]),
    "put": (c_int, [Vm, c_uint32]),
    "fault": (c_int, [Vm, c_uint32, c_uint64, c_uint32, POINTER(Fault)]),
    "translate": (c_int, [Vm, c_uint32, c_uint64, c_uint32, POINTER(Fault)]),
    "walk": (c_int, [Vm, c_uint32, c_uint64, c_uint32, c_int, POINTER(Walk)]),
    "fault_many": (c_int, [Vm, c_uint32, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, POINTER(c_size_t)]),
    "translate_many": (c_int, [Vm, c_uint32, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t]),
    "tlbi": (c_int, [Vm, c_uint32, c_uint32, c_uint64, c_void_p, POINTER(TlbiResult)]),
    "host_map": (c_int, [Vm, c_uint64, c_uint64, c_uint64, c_uint32, c_uint32, POINTER(Change)]),
    "host_unmap": (c_int, [Vm, c_uint64, c_uint64, c_uint32, POINTER(Change)]),
    "host_protect": (c_int, [Vm, c_uint64, c_uint64, c_uint32, POINTER(Change)]),
    "set_populate": (c_int, [Vm, c_void_p]),
    "log_dirty": (c_int, [Vm, c_uint64, c_uint64, c_int, POINTER(Change)]),
    "dirty_log": (c_int, BITMAP),
    "age": (c_int, BITMAP),
    "test_young": (c_int, BITMAP),
    "take_tlbis": (c_int, [Vm, c_void_p, c_size_t, POINTER(c_size_t)]),
    "stats": (c_int, [Vm, c_void_p]),
    "check": (c_int, [Vm]),
}


class Table(Structure):
    _fields_ = [("size", c_uint32), ("abi_version", c_uint32),
                *((name, ctypes.CFUNCTYPE(result, *arguments)) for name, (result, arguments) in FUNCTIONS.items())]


def capsule_pointer(capsule, name):
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = c_void_p, [ctypes.py_object, c_char_p]
    return get(capsule, name)


def native(nested_vm):
    """The handle of a ``NestedVM``."""
    return capsule_pointer(nested_vm._c_handle, b"s2shadow.s2s_vm")


api = ctypes.cast(capsule_pointer(s2._C_API, b"s2shadow._C_API"), POINTER(Table)).contents


class Failed(Exception):
    def __init__(self, status):
        super().__init__(api.last_error().decode())
        self.status = status


def call(status):
    if status != OK:
        raise Failed(status)


def aligned(nbytes):
    """A zeroed uint64 array that starts on a page."""
    raw = np.zeros(nbytes + 4096, dtype=np.uint8)
    start = -raw.ctypes.data % 4096
    return raw[start : start + nbytes].view(np.uint64)


class CVM:
    """A VM made through the table; what its functions answer comes as the Python API's arrays and tuples."""

    def __init__(self, features=None, **options):
        o = Options()
        api.options_init(byref(o), ctypes.sizeof(o))
        for name, value in options.items():
            setattr(o, name, value)
        if features is not None:
            f = Features()
            api.features_init(byref(f), ctypes.sizeof(f))
            for name, value in features.items():
                setattr(f, name, value)
            o.features = ctypes.pointer(f)
        self.handle = Vm()
        self.kept = []
        call(api.create(byref(o), byref(self.handle)))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        api.destroy(self.handle)

    def add_ram(self, cipa, words, flags=0):
        self.kept.append(words)
        call(api.add_ram(self.handle, cipa, words.nbytes, words.ctypes.data, flags))

    def add_callbacks(self, cipa, size, read, cas=None, flags=0):
        """``read(cipa)`` gives a word or None; ``cas(cipa, expected, desired)`` (answer, what is there)."""

        def read_word(_, address, word):
            value = read(address)
            if value is None:
                return 0
            word[0] = value
            return 1

        def swap_word(_, address, expected, desired):
            answer, expected[0] = cas(address, expected[0], desired)
            return answer

        ops = MemoryOps(read=READ_FN(read_word), cas=CAS_FN(swap_word) if cas else CAS_FN())
        self.kept.append(ops)
        call(api.add_callbacks(self.handle, cipa, size, byref(ops), None, flags))

    def remove(self, cipa):
        return self.change(api.remove_region, cipa)

    def change(self, function, *arguments):
        change = Change()
        call(function(self.handle, *arguments, byref(change)))
        return change.leaves, change.ticket

    def populate_linear(self, offset=0, max_block=0, fresh=0):
        call(api.set_populate(self.handle, byref(Populate(policy=POPULATE_LINEAR, offset=offset, max_block=max_block,
                                                          fresh=fresh))))

    def populate(self, function):
        """``function(cipa, access, mapping)`` fills in the mapping and returns what the callback shall."""
        policy = Populate(policy=POPULATE_CALLBACK,
                          callback=POPULATE_FN(lambda _, cipa, access, mapping: function(cipa, access, mapping[0])))
        self.kept.append(policy)
        call(api.set_populate(self.handle, byref(policy)))

    def load(self, vttbr, vtcr, hcr=s2.HCR_VM, big_endian=False, vcpu=0):
        index = c_uint32()
        registers = Registers(big_endian=big_endian, vttbr=vttbr, vtcr=vtcr, hcr=hcr)
        call(api.load(self.handle, vcpu, byref(registers), byref(index)))
        return index.value

    def fault(self, ipa, access=1, vcpu=0):
        fault = Fault()
        call(api.fault(self.handle, vcpu, ipa, access, byref(fault)))
        return fault

    def translate(self, ipa, access=1, vcpu=0):
        fault = Fault()
        call(api.translate(self.handle, vcpu, ipa, access, byref(fault)))
        return fault

    def walk(self, ipa, access=1, update=True, vcpu=0):
        walk = Walk()
        call(api.walk(self.handle, vcpu, ipa, access, update, byref(walk)))
        return walk

    def fault_many(self, ipas, access=1, vcpu=0):
        """(status, rows that are valid)."""
        ipas = np.ascontiguousarray(ipas, dtype=np.uint64)
        masks = np.atleast_1d(np.asarray(access, dtype=np.uint8))
        out = np.zeros(len(ipas), dtype=s2.FAULT_DTYPE)
        done = c_size_t()
        status = api.fault_many(self.handle, vcpu, ipas.ctypes.data, masks.ctypes.data, int(len(masks) > 1),
                                out.ctypes.data, len(ipas), byref(done))
        return status, out[: done.value]

    def tlbi(self, insn, xt=0, vcpu=0, registers=None):
        result = TlbiResult()
        call(api.tlbi(self.handle, vcpu, insn, xt, byref(registers) if registers else None, byref(result)))
        return result.removed, result.required, result.contexts

    def bitmap(self, function, start, end):
        bits = np.full(((end - start >> 12) + 7) // 8, 0xAA, dtype=np.uint8)
        call(function(self.handle, start, end, bits.ctypes.data, bits.nbytes))
        return bits

    def take_tlbis(self, limit=8192):
        rows = np.zeros(limit, dtype=s2.HW_TLBI_DTYPE)
        taken = c_size_t()
        call(api.take_tlbis(self.handle, rows.ctypes.data, limit, byref(taken)))
        return rows[: taken.value]

    def stats(self):
        stats = Stats()
        call(api.stats(self.handle, byref(stats)))
        return {name: getattr(stats, name) for name in STATS}

    def check(self):
        call(api.check(self.handle))
