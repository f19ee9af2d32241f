# cython: language_level=3, freethreading_compatible=True
"""The stage-2 MMU of a toy simulator: L2's loads go through shadows that s2shadow keeps.

The simulator's memory is one buffer, which is L1's physical memory too; its host keeps page N of L1 at PA
``HOST_BASE + N``. Nothing in the loop of a load is Python.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from s2shadow cimport (
    S2S_HCR_VM, S2S_HIT, S2S_L1_FAULT, S2S_MAPPED, S2S_OK, S2S_PARTIAL_DEFAULT, S2S_POPULATE_CALLBACK, S2S_READ,
    s2s_api_t, s2s_change_t, s2s_fault_t, s2s_from_python, s2s_import, s2s_mapping_t, s2s_options_t, s2s_populate_t,
    s2s_registers_t, s2s_vm_t,
)

cdef const s2s_api_t *s2s = s2s_import()
cdef uint64_t HOST_BASE = <uint64_t>1 << 40


cdef int populate(void *mmu, uint64_t cipa, uint32_t access, s2s_mapping_t *mapping) noexcept nogil:
    """Where the host keeps L1's page; runs with no lock held, and without the GIL."""
    mapping.pa = HOST_BASE + (cipa & ~<uint64_t>4095)
    (<uint64_t *>mmu)[0] += 1
    return 1


cdef class ToyMmu:
    """An MMU over ``memory`` (a writable buffer, a multiple of 4096 bytes), which stands at cIPA 0."""

    cdef s2s_vm_t *vm
    cdef uint8_t[::1] memory
    cdef uint64_t populated

    def __cinit__(self, uint8_t[::1] memory not None):
        cdef s2s_options_t options
        cdef s2s_populate_t policy
        self.memory = memory
        s2s.options_init(&options, sizeof(options))
        options.contexts = 4
        if s2s.create(&options, &self.vm) != S2S_OK:
            raise MemoryError(s2s.last_error().decode())
        policy.size = sizeof(policy)
        policy.policy = S2S_POPULATE_CALLBACK
        policy.offset = 0
        policy.max_block = 0
        policy.fresh = 0
        policy.callback = populate
        policy.opaque = &self.populated
        if (s2s.add_ram(self.vm, 0, memory.shape[0], &memory[0], 0) != S2S_OK
                or s2s.set_populate(self.vm, &policy) != S2S_OK):
            raise ValueError(s2s.last_error().decode())

    def __dealloc__(self):
        s2s.destroy(self.vm)

    def enter(self, uint64_t vttbr, uint64_t vtcr):
        """L1 enters L2 with these registers."""
        cdef s2s_registers_t registers
        registers.size = sizeof(registers)
        registers.big_endian = 0
        registers.vttbr, registers.vtcr, registers.hcr, registers.s2pir = vttbr, vtcr, S2S_HCR_VM, 0
        if s2s.load(self.vm, 0, &registers, NULL) != S2S_OK:
            raise ValueError(s2s.last_error().decode())

    def sum(self, uint64_t ipa, uint64_t n):
        """The sum of ``n`` 64-bit words from ``ipa`` on, as L2 reads them, faulting as it goes."""
        cdef uint64_t word = 0, total = 0, i
        cdef s2s_fault_t fault
        cdef int status = S2S_OK
        if ipa % 8:
            raise ValueError(f"{ipa:#x} is not 8-byte aligned: a word of it may lie in two pages")
        fault.kind = S2S_HIT
        with nogil:
            for i in range(n):
                status = s2s.fault(self.vm, 0, ipa + 8 * i, S2S_READ, &fault)
                if status != S2S_OK or (fault.kind != S2S_HIT and fault.kind != S2S_MAPPED):
                    break
                memcpy(&word, &self.memory[0] + (fault.pa - HOST_BASE), sizeof(word))
                total += word
        if status != S2S_OK:
            raise ValueError(s2s.last_error().decode())
        if fault.kind != S2S_HIT and fault.kind != S2S_MAPPED:
            raise LookupError(f"{'L1' if fault.kind == S2S_L1_FAULT else 'the host'} has nothing at {fault.ipa:#x}")
        return total

    def take_away(self, uint64_t start, uint64_t end):
        """The host wants the pages of [start, end) of cIPA back: how many shadow leaves that dropped."""
        cdef s2s_change_t change
        if s2s.host_unmap(self.vm, start, end, S2S_PARTIAL_DEFAULT, &change) != S2S_OK:
            raise ValueError(s2s.last_error().decode())
        return change.leaves

    @property
    def populated(self):
        """Host faults served."""
        return self.populated


def count_hits(nested_vm, uint64_t ipa, uint64_t n):
    """How many of ``n`` pages from ``ipa`` on vCPU 0 of a ``NestedVM`` hits in its shadow, by its native handle."""
    cdef s2s_vm_t *vm = s2s_from_python(nested_vm)
    cdef s2s_fault_t fault
    cdef uint64_t i, hits = 0
    with nogil:
        for i in range(n):
            if s2s.translate(vm, 0, ipa + 4096 * i, S2S_READ, &fault) == S2S_OK:
                hits += fault.kind == S2S_HIT
    return hits
