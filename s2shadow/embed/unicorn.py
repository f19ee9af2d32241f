"""A ``NestedVM`` as the second stage of a Unicorn arm64 instance. Needs the extra ``unicorn``.

``attach(uc, vm)`` puts the engine under the program that runs on ``uc``: the program is L2, or L1 itself, each address
that it uses is an IPA, and each miss of Unicorn's TLB asks the engine through a native function, without Python and
without the GIL. ``cpu.run()`` runs it, and in between hands L1's faults to a Python handler, asks ``populate``,
serves devices, and does the TLB maintenance that is owed. TLBIs that the program executes go to the engine.

**The synchronisation point.** Unicorn has a TLB for each instance, which no other thread can flush. After
``vm.unmap(...)``, or any change of the host or of L1, L2 may go on for a moment with what its TLB has. When
``cpu.sync()`` (or ``sync(vm)``), called after it, has returned, no CPU of the VM can reach what was taken: only then
may the host page be used for something else. It takes what ``vm.take_tlbis()`` would give; who takes the rows himself
has to call ``cpu.flush()`` for them.

What it cannot do:

- Stage 1 of L2. Unicorn's virtual TLB replaces both stages, so an address of L2 is its IPA. Where the program sets
  SCTLR_EL1.M, the run ends with ``NotImplementedError``.
- Exceptions. A fault that L1 would inject into L2 (an abort at EL1) has no way in; nor do interrupts and timers come
  from here. What Unicorn raises by itself comes out of ``run`` as ``unicorn.UcError``.
- EL2 and EL3. The second stage is that of EL1 and EL0. TLBIs of L1's are trapped at EL1, as FEAT_NV does.
- The low 12 bits of FAR_EL2: Unicorn tells the page of a faulting access alone.
- Flushing less than everything: one page that goes costs the CPU its whole TLB, and one fill for each page after it.
  A TLB entry is one page, whatever the size of the leaf.
- Memory attributes, shareability and stage-1 walks (``Access.PTW``): Unicorn has no caches and no first stage.
- Atomics between instances. LDXR and STXR of two CPUs on one memory are not exclusive of each other.
- Being called while it runs: ``uc.mem_map``, ``uc.ctl_flush_tb`` and all the rest of ``uc`` are for the thread that
  runs it, or for when nothing runs. ``stop``, ``sync``, ``unmap`` and ``flush`` are for all threads.
- Code that is written by somebody else: Unicorn keeps what it translated until ``uc.ctl_flush_tb()``. The program's
  own stores it sees.
- Ctrl-C while L2 runs undisturbed: Python gets its turn when the run ends; ``stop()`` from another thread ends it.
"""

import ctypes
import operator
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

try:
    from unicorn import arm64_const, unicorn_const
    from unicorn.unicorn_py3.unicorn import Uc, UcError, uclib
except ImportError as error:
    raise ImportError("s2shadow.embed.unicorn needs Unicorn 2.1.4: pip install 's2shadow[unicorn]'") from error

from s2shadow.constants import Access, Kind
from s2shadow.embed._unicorn import Attachment, Hub
from s2shadow.engine import VCPU, Fault, Invalidation, NestedVM

__all__ = ["Abort", "Counters", "Cpu", "Exit", "UnhandledFault", "attach", "sync"]

FUNCTIONS = ("uc_hook_add", "uc_hook_del", "uc_ctl", "uc_emu_start", "uc_emu_stop", "uc_reg_read", "uc_reg_write",
             "uc_mem_map_ptr")
SCTLR_EL1 = (3, 0, 1, 0, 0)
SCTLR_M = 1
DEVICE_WINDOW = 1 << 60     # physical addresses of devices, as Unicorn sees them: beyond every PA of the architecture
NO_PAGE = -1
DEVICE_SLOTS = 64           # device pages at a time: what one costs Unicorn grows with how many there are, to 4,096
EC_INSTRUCTION_ABORT, EC_DATA_ABORT = 0x20, 0x24        # from a lower exception level
ESR_IL, ISS_WNR = 1 << 25, 1 << 6

Device = Callable[[int, int, int | None], int | None]


class Exit(IntEnum):
    """Why ``run`` came back: DONE at ``until``; STOPPED by ``stop()``; HALTED: Unicorn stopped (WFI, ``uc.emu_stop`` in
    a hook)."""

    DONE = 0
    STOPPED = 1
    HALTED = 2


class Counters(NamedTuple):
    """Of one CPU: TLB ``fills`` asked for, ``tlbis`` handed to the engine, TLB ``flushes``, and those of them amid
    a run: ``interruptions``."""

    fills: int
    tlbis: int
    flushes: int
    interruptions: int


@dataclass(frozen=True, slots=True)
class Abort:
    """A stage-2 abort of L2 as L1 gets it: ``fault``, the engine's; ``access``, what L2 did; ``pc``, where it is.

    ``esr``, ``hpfar`` and ``far`` are ESR_EL2, HPFAR_EL2 and FAR_EL2; the low 12 bits of ``far`` are not known (0), and
    ISV is 0.
    """

    fault: Fault
    access: Access
    pc: int

    @property
    def ipa(self) -> int:
        """Of the page (bits 11:0 are 0)."""
        return self.fault.ipa

    @property
    def far(self) -> int:
        """FAR_EL2, of the page."""
        return self.fault.ipa

    @property
    def hpfar(self) -> int:
        """HPFAR_EL2."""
        return self.fault.hpfar

    @property
    def esr(self) -> int:
        """ESR_EL2: the exception class, IL, WnR and the fault status code."""
        kind = EC_INSTRUCTION_ABORT if self.access & Access.EXEC else EC_DATA_ABORT
        return kind << 26 | ESR_IL | (ISS_WNR if self.access & Access.WRITE else 0) | self.fault.fsc

    def __str__(self) -> str:
        what = "write" if self.access & Access.WRITE else "fetch" if self.access & Access.EXEC else "read"
        return f"{what} at {self.ipa:#x} from pc {self.pc:#x}: {self.fault}"


class UnhandledFault(RuntimeError):
    """An access of L2 that nobody serves; ``abort`` tells which. The PC is still at it, ``run()`` tries it again."""

    def __init__(self, abort: Abort) -> None:
        super().__init__(str(abort))
        self.abort = abort


_hubs_lock = threading.RLock()      # a finalizer that runs amid may attach too
_hubs: "weakref.WeakValueDictionary[int, Hub]" = weakref.WeakValueDictionary()


def _hub(vm: NestedVM) -> Hub:
    with _hubs_lock:                # two hubs of one VM would each flush a part of its CPUs
        hub = Hub(vm)
        return _hubs.setdefault(id(vm), hub)    # it holds the VM, so that the number stands for no other


def sync(vm: NestedVM) -> None:
    """Return when no Unicorn CPU of ``vm`` can reach what the host or L1 took before the call. ``Cpu.sync``."""
    hub = _hubs.get(id(vm))
    if hub is not None:
        hub.sync()


def attach(
    uc: Uc,
    vm: NestedVM,
    vcpu: int = 0,
    *,
    on_l1_fault: Callable[[Abort], object] | None = None,
    device: Device | None = None,
    traps: bool = True,
) -> "Cpu":
    """Make ``vm.vcpus[vcpu]`` the second stage of ``uc`` -> ``Cpu``.

    ``uc`` is an arm64 Unicorn, best fresh: its TLB becomes virtual and its page that of the host (Unicorn's own
    default is 1 KiB, four fills a page; once it is set up that cannot be changed).
    ``on_l1_fault(abort)`` is L1's handler: it mends L1's table in ``vm.mem``, with the ``vcpu.tlbi`` that this takes,
    and returns something true, and the access is tried again; else, or with no handler, ``run`` raises
    ``UnhandledFault``. It may load another context.
    ``device(cipa, size, value)`` serves MMIO, up to 4 bytes at a time (Unicorn halves accesses of 8): value None asks
    for what is read.
    ``traps``: TLBIs of L1's that the program executes act on the engine; without it they are undefined.

    ``ValueError`` where ``uc`` is no little-endian arm64 one, is attached already, or has pages larger than the host's.
    """
    return Cpu(uc, vm, vcpu, on_l1_fault, device, traps)


class Cpu:
    """A Unicorn instance whose second stage is a ``NestedVM``. From ``attach``.

    Thread safety: one thread runs; ``sync``, ``stop``, ``unmap`` and ``flush`` may be called by any, by handlers,
    devices and hooks. Who calls them must not hold a lock that a hook of his own on ``uc`` waits for; handlers,
    ``populate`` and devices may wait for it, but for a lock held over ``stop``, which waits for devices too.
    Called by a hook of the embedder's on ``uc``, they flush that CPU before its next block, and do not wait for another
    whose hook is in such a call too: what is left of the block, and the access that a hook of accesses is about, still
    go by what the TLB had. Before a page is used for something else it takes a ``sync`` from outside of hooks.

    A hook that refers to the ``Cpu`` keeps it, and the VM, until ``detach``.
    """

    def __init__(
        self, uc: Uc, vm: NestedVM, vcpu: int, on_l1_fault: Callable[[Abort], object] | None,
        device: Device | None, traps: bool,
    ) -> None:  # fmt: skip
        _check_machine(uc)
        if not 0 <= vcpu < len(vm.vcpus):
            raise ValueError(f"vcpu must be 0 to {len(vm.vcpus) - 1}, got {vcpu}")
        page = _prepare(uc, vm.features.host_granule)
        self.uc = uc
        self.vm = vm
        self.vcpu: VCPU = vm.vcpus[vcpu]
        self.on_l1_fault = on_l1_fault
        self.device = device
        self._page = page
        self._device_pages: list[int] = []      # by slot
        self._oldest_slot = 0
        self._device_error: BaseException | None = None
        self._mapped: list[tuple[int, int]] = []
        self._buffers: list[Any] = []
        self._hub = _hub(vm)
        self._native = Attachment(self._hub, vcpu, uc, uc._uch.value or 0, _addresses(), _constants(page), traps)
        # before Unicorn's own, which closes the instance
        self._release = weakref.finalize(self, _detach, self._native, self._mapped)

    def map_memory(self, offset: int = 0) -> None:
        """Put all RAM of ``vm.mem`` where ``Linear(offset)`` has it: physical address = cIPA + offset. No copy is made.

        Regions that are added later need another call; those that are there already are left alone.
        """
        taken = {start for start, _ in self._mapped}
        for region in self.vm.mem.regions:
            if not region.device and region.start + offset not in taken:
                _raise_uc(self._native.map_region(region.start + offset, region.start))
                self._mapped.append((region.start + offset, region.size))

    def map_ram(self, pa: int, buffer: Any) -> None:
        """Put a writable C-contiguous buffer at physical address ``pa``; it stays in use until ``detach``.

        ``ValueError`` where address or size is not a multiple of the page, ``unicorn.UcError`` on an overlap.
        """
        if not self._native.attached:
            raise RuntimeError("detached from Unicorn")
        view = memoryview(buffer).cast("B")
        if view.readonly:
            raise ValueError("buffer must be writable")
        if pa % self._page or len(view) % self._page or not len(view):
            raise ValueError(f"pa {pa:#x} and size {len(view):#x} must be multiples of {self._page}")
        host = ctypes.addressof(ctypes.c_char.from_buffer(view))
        self.uc.mem_map_ptr(pa, len(view), unicorn_const.UC_PROT_ALL, host)
        self._mapped.append((pa, len(view)))
        self._buffers.append(view)

    def run(self, begin: int | None = None, until: int = 0) -> Exit:
        """Run L2 from ``begin`` (None: where it is) until its PC is ``until`` (0: no such place) -> ``Exit``.

        The vCPU must be loaded. Raises ``UnhandledFault``; what a handler, ``populate``, a device or a hook raises;
        ``unicorn.UcError``; ``RuntimeError`` where the vCPU is not loaded or in use; ``NotImplementedError`` where L2
        turns its stage 1 on. After any of them ``run()`` goes on from where it is.
        """
        if not self._native.begin():
            raise RuntimeError("it runs already")
        try:
            self._check_regime()
            pc = self.uc.reg_read(arm64_const.UC_ARM64_REG_PC) if begin is None else begin
            return self._run(pc, until)
        finally:
            self._native.end()

    def _run(self, pc: int, until: int) -> Exit:
        synced = False
        while True:
            self.uc._hook_exception = None
            error, pc, done = self._native.resume(pc, until, synced)
            raised = self._device_error or self.uc._hook_exception
            if raised is not None:
                self._device_error = None
                raise raised
            if done:
                return Exit.DONE
            if self._native.stage1_on:
                raise NotImplementedError("L2 turned its stage 1 on (SCTLR_EL1.M), which this adapter does not walk")
            if error == unicorn_const.UC_ERR_EXCEPTION and self._native.refused is not None:
                synced = self._serve(*self._native.refused, pc)
            elif error:
                raise UcError(error)
            elif self._native.stopping:
                return Exit.STOPPED
            else:
                return Exit.HALTED

    def _serve(self, ipa: int, access: int, pc: int) -> bool:
        """Answer an access that the native fill could not; False where the embedder's code ran, and may have changed
        what no row that is owed speaks of."""
        synced = not callable(self.vm.host.populate)
        fault = self.vcpu.fault(ipa, access)        # asks populate; MemoryError where there is no room
        if fault.kind in (Kind.HIT, Kind.MAPPED):
            return synced
        if fault.kind == Kind.RETRY:
            time.sleep(0)
            return synced
        abort = Abort(fault, Access(access), pc)
        if fault.kind == Kind.L1_FAULT and self.on_l1_fault is not None and self.on_l1_fault(abort):
            return False
        if fault.kind == Kind.MMIO and self.device is not None and not access & Access.EXEC:
            self._let_at_device(fault, access)
            return synced
        raise UnhandledFault(abort)

    def _let_at_device(self, fault: Fault, access: int) -> None:
        page = fault.cipa & -self._page
        if page in self._device_pages:
            slot = self._device_pages.index(page)
        elif len(self._device_pages) < DEVICE_SLOTS:
            slot = len(self._device_pages)
            self._device_pages.append(NO_PAGE)      # used up, whatever interrupts what follows
            self.uc.mmio_map(self._slot_address(slot), self._page, *_device_hooks(weakref.ref(self), slot))
            self._mapped.append((self._slot_address(slot), self._page))
            self._device_pages[slot] = page
        else:
            slot = self._oldest_slot
            self._oldest_slot = (slot + 1) % DEVICE_SLOTS
            self._native.revoke(self._slot_address(slot))
            self._device_pages[slot] = page
        self._native.grant(fault.ipa, fault.cipa, access, self._slot_address(slot))

    def _slot_address(self, slot: int) -> int:
        return DEVICE_WINDOW + slot * self._page

    def _check_regime(self) -> None:
        uc: Any = self.uc       # Uc() makes an arm64 one, whose methods mypy does not see
        if uc.reg_read(arm64_const.UC_ARM64_REG_PSTATE) >> 2 & 2:
            raise ValueError("the CPU is at EL2 or EL3, which have no second stage")
        if uc.cpr_read(*SCTLR_EL1) & SCTLR_M:
            raise NotImplementedError("L2's stage 1 is on (SCTLR_EL1.M), which this adapter does not walk")

    def stop(self) -> None:
        """End ``run``, which returns ``Exit.STOPPED``; wait until L2 is out, and its device if it is in one.

        In a hook or a device it waits for neither. Nothing happens where it does not run; a ``run`` that begins
        meanwhile is not waited for.
        """
        self._native.stop()

    def sync(self) -> None:
        """Return when no CPU of the VM can reach what the host or L1 took before the call.

        CPUs that hold none of it are not disturbed; those that do flush before the next block that they execute.
        """
        self._hub.sync()

    def flush(self) -> None:
        """Empty this CPU's TLB; for who takes ``vm.take_tlbis()`` himself."""
        self._native.flush()

    def unmap(self, start: int, end: int) -> Invalidation:
        """``vm.unmap(start, end)`` and ``sync``: on return the page is out of reach."""
        result = self.vm.unmap(start, end)
        self._hub.sync()
        return result

    @property
    def tlbi_registers(self) -> tuple[int, int, int] | None:
        """(VTTBR_EL2, VTCR_EL2, HCR_EL2) under which the program's TLBIs act; None: those the vCPU loaded last."""
        return self._native.registers

    @tlbi_registers.setter
    def tlbi_registers(self, values: tuple[int, int, int] | None) -> None:
        self._native.registers = values

    @property
    def counters(self) -> Counters:
        """What has happened since ``attach``."""
        return Counters(*self._native.counters)

    def detach(self) -> None:
        """Take the hooks and the memory away again; ``uc`` lives on, with a virtual TLB that maps nothing of ours.

        ``RuntimeError`` while it runs.
        """
        self._native.detach()
        self._release()
        self._buffers.clear()

    def __repr__(self) -> str:
        return f"Cpu({self.vcpu!r}, {self.counters})"


def _detach(native: Attachment, mapped: list[tuple[int, int]]) -> None:
    native.detach()
    for address, size in mapped:
        native.uc.mem_unmap(address, size)
    mapped.clear()


def _device_hooks(owner: "weakref.ref[Cpu]", slot: int) -> tuple[Any, ...]:
    """Arguments of ``mmio_map`` for a slot of device pages. Unicorn keeps them: they must not keep the ``Cpu``."""

    def call(offset: int, size: int, value: int | None) -> int:
        cpu = owner()
        assert cpu is not None
        cipa = cpu._device_pages[slot] + offset
        cpu._native.quiet()
        try:
            if cpu.device is None:
                raise RuntimeError(f"device was set to None, and L2 is at {cipa:#x}")
            answer = cpu.device(cipa, size, value)
            if value is None and answer is None:
                raise TypeError(f"device returned None for a read at {cipa:#x}")
            return operator.index(answer or 0) & (1 << 8 * size) - 1
        except BaseException as error:
            cpu._device_error = cpu._device_error or error      # it comes out of run(): through Unicorn it would not
            cpu._native.stop()
            return 0
        finally:
            cpu._native.wake()

    def read(_uc: Uc, offset: int, size: int, _data: None) -> int:
        return call(offset, size, None)

    def write(_uc: Uc, offset: int, size: int, value: int, _data: None) -> None:
        call(offset, size, value)

    return read, None, write, None


def _check_machine(uc: Uc) -> None:
    if not isinstance(uc, Uc):
        raise TypeError(f"uc must be a unicorn.Uc, got {type(uc).__name__}")
    if uc.ctl_get_arch() != unicorn_const.UC_ARCH_ARM64 or uc.ctl_get_mode() & unicorn_const.UC_MODE_BIG_ENDIAN:
        raise ValueError("uc must be a little-endian arm64 Unicorn")


def _prepare(uc: Uc, host_page: int) -> int:
    """Virtual TLB, host pages; the size of Unicorn's pages."""
    try:
        uc.ctl_set_page_size(host_page)
    except UcError:
        pass                # it is set up already; its pages may still do
    uc.ctl_set_tlb_mode(unicorn_const.UC_TLB_VIRTUAL)
    page = uc.ctl_get_page_size()
    if page > host_page:
        raise ValueError(f"Unicorn's pages of {page} bytes are larger than the host's ({host_page})")
    return page


def _raise_uc(error: int) -> None:
    if error:
        raise UcError(error)


def _addresses() -> dict[str, int]:
    """Where the functions of the library that the package has loaded are."""
    return {name: ctypes.cast(getattr(uclib, name), ctypes.c_void_p).value or 0 for name in FUNCTIONS}


def _constants(page: int) -> dict[str, int]:
    return {
        "hook_tlb_fill": unicorn_const.UC_HOOK_TLB_FILL,
        "hook_insn": unicorn_const.UC_HOOK_INSN,
        "hook_block": unicorn_const.UC_HOOK_BLOCK,
        "insn_sys": arm64_const.UC_ARM64_INS_SYS,
        "insn_msr": arm64_const.UC_ARM64_INS_MSR,
        "flush_control": unicorn_const.UC_CTL_TLB_FLUSH | unicorn_const.UC_CTL_IO_WRITE << 30,
        "reg_pc": arm64_const.UC_ARM64_REG_PC,
        "reg_pstate": arm64_const.UC_ARM64_REG_PSTATE,
        "page_size": page,
    }
