"""s2shadow's C API from ctypes: no compiler, no header, only the table behind the capsule.

The table begins with its size and ABI version; the functions follow in the order of s2shadow.h, each a pointer wide.
Run: ``python ctypes_call.py``
"""

import ctypes
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_int8, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p

import s2shadow

PAGE = 4096
DESC_PAGE = 0x7FF           # valid page, MemAttr 1111, S2AP rw, inner shareable, AF
VTCR = 25 | 1 << 6 | 5 << 16        # 4 KiB granule, 39 bits of IPA, tables from level 1 on, 48 bits of output
S2S_READ, S2S_MAPPED, S2S_HIT, S2S_POPULATE_LINEAR, HCR_VM = 1, 1, 0, 1, 1


class Registers(Structure):
    _fields_ = [("size", c_uint32), ("big_endian", c_uint32), ("vttbr", c_uint64), ("vtcr", c_uint64),
                ("hcr", c_uint64), ("s2pir", c_uint64)]


class Populate(Structure):
    _fields_ = [("size", c_uint32), ("policy", c_uint32), ("offset", c_uint64), ("max_block", c_uint64),
                ("fresh", c_uint32), ("reserved", c_uint32), ("callback", c_void_p), ("opaque", c_void_p)]


class Fault(Structure):
    _fields_ = [("kind", c_uint8), ("fsc", c_uint8), ("level", c_int8), ("perm", c_uint8), ("context", c_uint16),
                ("ipa", c_uint64), ("cipa", c_uint64), ("pa", c_uint64), ("block", c_uint64), ("hpfar", c_uint64)]


Vm = c_void_p
# The first functions of s2s_api_t, in order: name, result, arguments. A table may end anywhere for who needs no more.
FUNCTIONS = [
    ("status_text", c_char_p, [c_int]),
    ("last_error", c_char_p, []),
    ("features_init", None, [c_void_p, ctypes.c_size_t]),
    ("options_init", None, [c_void_p, ctypes.c_size_t]),
    ("create", c_int, [c_void_p, POINTER(Vm)]),
    ("destroy", None, [Vm]),
    ("add_ram", c_int, [Vm, c_uint64, c_uint64, c_void_p, c_uint32]),
    ("add_device", c_int, [Vm, c_uint64, c_uint64]),
    ("add_callbacks", c_int, [Vm, c_uint64, c_uint64, c_void_p, c_void_p, c_uint32]),
    ("remove_region", c_int, [Vm, c_uint64, c_void_p]),
    ("load", c_int, [Vm, c_uint32, POINTER(Registers), POINTER(c_uint32)]),
    ("put", c_int, [Vm, c_uint32]),
    ("fault", c_int, [Vm, c_uint32, c_uint64, c_uint32, POINTER(Fault)]),
    ("translate", c_int, [Vm, c_uint32, c_uint64, c_uint32, POINTER(Fault)]),
    ("walk", c_int, [Vm, c_uint32, c_uint64, c_uint32, c_int, c_void_p]),
    ("fault_many", c_int, [Vm, c_uint32, c_void_p, c_void_p, ctypes.c_size_t, c_void_p, ctypes.c_size_t, c_void_p]),
    ("translate_many", c_int, [Vm, c_uint32, c_void_p, c_void_p, ctypes.c_size_t, c_void_p, ctypes.c_size_t]),
    ("tlbi", c_int, [Vm, c_uint32, c_uint32, c_uint64, c_void_p, c_void_p]),
    ("host_map", c_int, [Vm, c_uint64, c_uint64, c_uint64, c_uint32, c_uint32, c_void_p]),
    ("host_unmap", c_int, [Vm, c_uint64, c_uint64, c_uint32, c_void_p]),
    ("host_protect", c_int, [Vm, c_uint64, c_uint64, c_uint32, c_void_p]),
    ("set_populate", c_int, [Vm, POINTER(Populate)]),
]


class Table(Structure):
    _fields_ = [("size", c_uint32), ("abi_version", c_uint32),
                *((name, ctypes.CFUNCTYPE(result, *arguments)) for name, result, arguments in FUNCTIONS)]


def capsule_pointer(capsule, name):
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = c_void_p, [ctypes.py_object, c_char_p]
    return get(capsule, name)


def table():
    """The C API as a ``Table``; ``RuntimeError`` for an ABI that this file does not know."""
    found = ctypes.cast(capsule_pointer(s2shadow._C_API, b"s2shadow._C_API"), POINTER(Table)).contents
    if found.abi_version >> 16 != 1 or found.size < ctypes.sizeof(Table):
        raise RuntimeError(f"s2shadow has C ABI {found.abi_version >> 16}.{found.abi_version & 0xFFFF}, not 1.0")
    return found


def main():
    api = table()

    def call(status):
        if status:
            raise RuntimeError(f"{api.status_text(status).decode()}: {api.last_error().decode()}")

    # L1's memory, 1 MiB at cIPA 0: root, a table of level 2, one of level 3, and 16 pages that L2 has from IPA 0 on
    memory = (c_uint64 * ((1 << 20) // 8 + PAGE // 8))()
    base = -(-ctypes.addressof(memory) // PAGE) * PAGE
    words = (c_uint64 * ((1 << 20) // 8)).from_address(base)
    words[0x1000 // 8] = 0x2000 | 3
    words[0x2000 // 8] = 0x3000 | 3
    for page in range(16):
        words[0x3000 // 8 + page] = 0x10000 + page * PAGE | DESC_PAGE

    vm = Vm()
    call(api.create(None, byref(vm)))
    call(api.add_ram(vm, 0, 1 << 20, base, 0))
    call(api.set_populate(vm, Populate(ctypes.sizeof(Populate), S2S_POPULATE_LINEAR, 1 << 30)))
    call(api.load(vm, 0, Registers(ctypes.sizeof(Registers), 0, 0x1000, VTCR, HCR_VM), None))
    fault = Fault()
    for kind in (S2S_MAPPED, S2S_HIT):
        for page in range(16):
            call(api.fault(vm, 0, page * PAGE + 8, S2S_READ, byref(fault)))
            assert (fault.kind, fault.pa) == (kind, (1 << 30) + 0x10000 + page * PAGE + 8)
    api.destroy(vm)

    # the handle of a NestedVM of Python's
    mem = s2shadow.GuestMemory()
    mem.add(0, 1 << 20)
    mem.write(0, bytes(words))
    nested = s2shadow.NestedVM(mem)
    nested.host.populate = "linear"
    nested.vcpus[0].load(0x1000, VTCR)
    handle = capsule_pointer(nested._c_handle, b"s2shadow.s2s_vm")
    call(api.fault(handle, 0, 0x3000, S2S_READ, byref(fault)))
    assert fault.kind == S2S_MAPPED and nested.vcpus[0].translate(0x3000).pa == fault.pa == 0x13000
    version = f"{api.abi_version >> 16}.{api.abi_version & 0xFFFF}"
    print(f"C ABI {version}: 32 faults of a VM without Python, 1 of a NestedVM")


if __name__ == "__main__":
    main()
