"""QEMU's own stage-2 walker, out of the Unicorn wheel: someone else's answer for any table, in half a microsecond.

The CPU stands at EL2, its own MMU off, and asks for translations of the EL1&0 regime: AT S12E1R and S12E1W (or the
E0 forms), then PAR_EL1. HCR_EL2.DC=1 keeps stage 1 out of the answer: flat, and Normal write-back non-shareable, so
that PAR shows stage 2's memory type and shareability as they are. `fetch` runs at EL1 instead: AT knows no execute.

This walker is that of QEMU 5.0. It knows only what this project calls Features(fwb=False, xnx=False, hafdbs=0), with
48-bit descriptors, and departs from the architecture, or from choices that the architecture leaves to us, in these
points. Callers keep them out of what they ask, all of a kind:
    IPA >= 2^PAMax    is stage 1's address size fault, so that stage 2 is never asked
    output size       never checked: callers add the rule (PA >= 2^PS is an address size fault)
    block levels      a block at a level that the granule forbids is taken for one
    block address     bits of a block descriptor below its size are ORed into the PA
    contiguous        the bit is ignored: the PA comes from the descriptor even where its neighbours disagree
    MemAttr           the reserved codes 0100, 1000 and 1100 show up as codes that MAIR does not have
    T0SZ > 39         is clamped to 39
    TG0 = 3           is taken for 64K
"""

import mmap
import struct
from dataclasses import dataclass

import numpy as np
import pytest

unicorn = pytest.importorskip("unicorn", reason="no Unicorn here (its wheel has the walker to compare with)")

CPUS = {"cortex-a53": unicorn.arm64_const.UC_CPU_ARM64_A53, "cortex-a72": unicorn.arm64_const.UC_CPU_ARM64_A72}
PA_BITS = {"cortex-a53": 40, "cortex-a72": 44}

CODE, ARGUMENTS, RESULTS = 0xE0_0000_0000, 0xE0_0010_0000, 0xE0_0020_0000  # callers keep their memory off these 4 MiB
BATCH = 1 << 15
FAULT, NOWHERE = -1, -2
FETCH_ERRORS = {
    unicorn.UC_ERR_EXCEPTION: FAULT,
    unicorn.UC_ERR_FETCH_UNMAPPED: NOWHERE,
    unicorn.UC_ERR_FETCH_PROT: NOWHERE,
}

# op0, op1, CRn, CRm, op2
SCR_EL3 = (3, 6, 1, 1, 0)
SCTLR_EL2, HCR_EL2 = (3, 4, 1, 0, 0), (3, 4, 1, 1, 0)
VTTBR_EL2, VTCR_EL2 = (3, 4, 2, 1, 0), (3, 4, 2, 1, 2)
SCR_NS_HCE_RW = 1 << 0 | 1 << 8 | 1 << 10
SCTLR_EE = 1 << 25
HCR_VM_DC_RW, HCR_CD = 1 << 0 | 1 << 12 | 1 << 31, 1 << 32
EL1H, EL2H = 0x3C5, 0x3C9  # PSTATE: DAIF set

PAR_F, PAR_PTW, PAR_S = 1 << 0, 1 << 8, 1 << 9
PAR_PA = (1 << 48) - (1 << 12)


def program(read, write):
    """Loop over x2 addresses at x0 and leave two PARs for each at x1."""
    words = [
        0xF8408403,  # ldr  x3, [x0], #8
        read,
        0xD5033FDF,  # isb
        0xD5387404,  # mrs  x4, par_el1
        write,
        0xD5033FDF,  # isb
        0xD5387405,  # mrs  x5, par_el1
        0xA8811424,  # stp  x4, x5, [x1], #16
        0xF1000442,  # subs x2, x2, #1
        0x54FFFEE1,  # b.ne to the start
    ]
    return struct.pack(f"<{len(words)}I", *words)


PROGRAMS = {
    False: (CODE, program(0xD50C7883, 0xD50C78A3)),  # at s12e1r, x3; at s12e1w, x3
    True: (CODE + 0x100, program(0xD50C78C3, 0xD50C78E3)),  # at s12e0r, x3; at s12e0w, x3
}

# read, write: whether that access is allowed, and if not the fault status code. If either is, pa (of the 4 KiB page),
# attr (as in MAIR) and sh (as in PAR) are those of the page.
ANSWER_DTYPE = np.dtype(
    [("read", "?"), ("write", "?"), ("read_fsc", "u1"), ("write_fsc", "u1"), ("pa", "u8"), ("attr", "u1"), ("sh", "u1")]
)


@dataclass(frozen=True)
class Registers:
    """What a walk depends on besides memory. Of ``hcr`` only CD counts."""

    vttbr: int
    vtcr: int
    hcr: int = 0
    big_endian: bool = False


class Oracle:
    """One CPU and its memory."""

    def __init__(self, cpu="cortex-a72"):
        self.pa_bits = PA_BITS[cpu]
        self.uc = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM, cpu=CPUS[cpu])
        self.uc.ctl_set_page_size(4096)
        self.buffers = []
        code = self.ram(CODE, 4096, unicorn.UC_PROT_ALL).view(np.uint8)
        for address, words in PROGRAMS.values():
            code[address - CODE : address - CODE + len(words)] = list(words)
        self.arguments = self.ram(ARGUMENTS, 8 * BATCH)
        self.results = self.ram(RESULTS, 16 * BATCH)
        self.uc.cpr_write(*SCR_EL3, SCR_NS_HCE_RW)
        self.sctlr = self.uc.cpr_read(*SCTLR_EL2)

    def ram(self, address, size, access=unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE):
        """Puts memory at a physical address; returns its words, which stay shared with the CPU."""
        buffer = mmap.mmap(-1, size)
        self.buffers.append(buffer)
        words = np.frombuffer(buffer, np.uint64)
        self.uc.mem_map_ptr(address, size, access, words.ctypes.data)
        return words

    def enter(self, pstate, regs):
        """Sets the registers and forgets what an earlier table or register left in the TLB."""
        uc = self.uc
        uc.reg_write(unicorn.arm64_const.UC_ARM64_REG_PSTATE, pstate)  # counts from the next system register on
        uc.cpr_write(*SCTLR_EL2, self.sctlr | (SCTLR_EE if regs.big_endian else 0))
        uc.cpr_write(*VTTBR_EL2, regs.vttbr)
        uc.cpr_write(*VTCR_EL2, regs.vtcr)
        uc.cpr_write(*HCR_EL2, HCR_VM_DC_RW | regs.hcr & HCR_CD)
        uc.ctl(unicorn.unicorn_const.UC_CTL_TLB_FLUSH, unicorn.unicorn_const.UC_CTL_IO_WRITE)

    def walk(self, ipas, regs, el0=False):
        """ANSWER_DTYPE[n] for uint64[n]."""
        self.enter(EL2H, regs)
        order = ">u8" if regs.big_endian else "<u8"  # SCTLR_EL2.EE turns the program's own loads and stores as well
        pars = np.empty(2 * len(ipas), np.uint64)
        for start in range(0, len(ipas), BATCH):
            part = ipas[start : start + BATCH]
            self.arguments.view(order)[: len(part)] = part
            self.run(*PROGRAMS[el0], len(part))
            pars[2 * start : 2 * (start + len(part))] = self.results.view(order)[: 2 * len(part)]
        return decode(pars.reshape(-1, 2))

    def run(self, address, words, count):
        registers = unicorn.arm64_const
        self.uc.reg_write(registers.UC_ARM64_REG_X0, ARGUMENTS)
        self.uc.reg_write(registers.UC_ARM64_REG_X1, RESULTS)
        self.uc.reg_write(registers.UC_ARM64_REG_X2, count)
        self.uc.emu_start(address, address + len(words))

    def pages(self, address, size):
        """Puts memory at a physical address full of an instruction that says which of its 4 KiB pages it is in."""
        numbers = np.arange(size >> 12, dtype=np.uint32)
        assert len(numbers) <= 1 << 16
        words = 0xD2800000 | numbers << 5  # mov x0, #number
        self.ram(address, size, unicorn.UC_PROT_ALL).view(np.uint32).reshape(-1, 1024)[:] = words[:, None]

    def fetch(self, ipas, regs):
        """Executes at EL1 the one instruction at each address, of memory of `pages`: int64[n] of page numbers, FAULT
        where the fetch faulted, NOWHERE where it was allowed and led to no such memory."""
        self.enter(EL1H, regs)
        return np.array([self.fetch_one(ipa) for ipa in ipas.tolist()], np.int64)

    def fetch_one(self, ipa):
        try:
            self.uc.emu_start(ipa, ipa + 4)
        except unicorn.UcError as error:
            return FETCH_ERRORS[error.errno]
        return self.uc.reg_read(unicorn.arm64_const.UC_ARM64_REG_X0)


def decode(pars):
    """ANSWER_DTYPE[n] of the PARs after a read and a write, uint64[n, 2]."""
    failed = pars & PAR_F != 0
    assert ((pars[failed] & (PAR_S | PAR_PTW)) == PAR_S).all(), "a fault that is not stage 2's own"
    answers = np.zeros(len(pars), ANSWER_DTYPE)
    for n, name in enumerate(("read", "write")):
        answers[name] = ~failed[:, n]
        answers[name + "_fsc"] = np.where(failed[:, n], pars[:, n] >> 1 & 63, 0)
    both = ~failed.any(axis=1)
    assert (pars[both, 0] == pars[both, 1]).all(), "reads and writes go to different places"
    par = np.where(failed[:, 0], pars[:, 1], pars[:, 0])
    par[failed.all(axis=1)] = 0
    answers["pa"], answers["attr"], answers["sh"] = par & PAR_PA, par >> 56, par >> 7 & 3
    return answers
