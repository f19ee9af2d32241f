"""The stage-2 tables of a capture, one by one: a VM's, the host's own, a shadow, and the shadow that the engine builds.

Where a guest hypervisor (L1) ran, a capture holds three kinds: what L1 wrote, the host's (L0's) table for L1, and the
shadows in which L0 combined the two.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from s2shadow.capture import Capture, CapturedVM, CaptureError, HostTable, NestedTable, features_of
from s2shadow.config import Stage2Config
from s2shadow.constants import EL0, EXEC, HIT, MAPPED, READ, WRITE
from s2shadow.engine import VCPU, NestedVM
from s2shadow.kerneltext import kernel_name
from s2shadow.memory import GuestMemory
from s2shadow.ranges import Rows, ranges, shadow_ranges
from s2shadow.walker import leaves

Folder = str | os.PathLike[str]


class Table(NamedTuple):
    """A stage-2 map with what it is. ``file``: what Linux calls a shadow's dump, or empty."""

    label: str
    cfg: Stage2Config
    rows: Rows
    file: str = ""


def vm_table(folder: Folder, vm: int | None = None, which: str = "auto") -> Table:
    """The table of a VM (default: the first); ``which`` as in ``GuestMemory.load_tables``."""
    from s2shadow.storm import pick_vm

    mem = GuestMemory()
    capture = mem.load_tables(folder, which=which)
    found = capture.vms[0] if vm is None else pick_vm(capture.vms, vm, capture.path)
    return read(f"VM {found.vm}", mem, found.config())


def host_table(folder: Folder) -> Table:
    """The host's own table for L1 (Linux: ``stage2_page_tables``)."""
    mem = GuestMemory()
    capture = mem.load_tables(folder, which="host")
    host = host_of(capture)
    hcr = capture.vms[0].hcr        # that of L0 while the L2 ran: FWB is one for the machine
    return read("host table for L1", mem, Stage2Config(host.vttbr, host.vtcr, features=features_of(host.vtcr), hcr=hcr))


def shadow_table(folder: Folder, index: int) -> Table:
    """Shadow ``index`` as the captured host filled it (Linux: a file under ``nested/``)."""
    mem = GuestMemory()
    capture = mem.load_tables(folder, which="host")
    nested = nested_of(capture, index)
    for vm in capture.vms:
        if vm.vttbr == nested.shadow_vttbr:
            return read(f"shadow {index}", mem, vm.config(), kernel_name(nested.l1_vttbr, nested.l1_vtcr))
    raise CaptureError(f"{capture.path}: no VM has shadow_vttbr_el2 {nested.shadow_vttbr:#x} of nested[{index}], so "
                       "its VTCR_EL2 is not known")


def engine_table(folder: Folder, index: int) -> Table:
    """Shadow ``index`` as the engine builds it from L1's table and the host's, every leaf of L1's faulted in."""
    try:
        vm, context, nested = build_shadow(folder, index)
    except CaptureError:
        raise
    except ValueError as error:
        raise CaptureError(f"{os.fspath(folder)}: shadow {index} cannot be built: {error}") from None
    found = vm.contexts[context]
    cfg = Stage2Config(found.host_vttbr, found.host_vtcr, features=vm.features, hcr=found.host_hcr)
    return Table(f"shadow {index} as the engine builds it", cfg, shadow_ranges(vm, context),
                 kernel_name(nested.l1_vttbr, nested.l1_vtcr))


def shadow_count(folder: Folder) -> int:
    return len(GuestMemory().load_tables(folder, which="host").nested)


def read(label: str, mem: GuestMemory, cfg: Stage2Config, file: str = "") -> Table:
    try:
        return Table(label, cfg, ranges(mem, cfg), file)
    except ValueError as error:
        raise CaptureError(f"{label} cannot be dumped: {error}") from None


def host_of(capture: Capture) -> HostTable:
    if capture.host is None:
        raise CaptureError(f"{capture.path} has no host table: no guest hypervisor ran in this capture")
    return capture.host


def nested_of(capture: Capture, index: int) -> NestedTable:
    if not capture.nested:
        raise CaptureError(f"{capture.path} has no shadow tables: no guest hypervisor ran in this capture")
    if index >= len(capture.nested):
        raise CaptureError(f"{capture.path} has no shadow {index}; it has {len(capture.nested)}, counted from 0")
    return capture.nested[index]


# --- what the engine builds ------------------------------------------------------------------------------------


def build_shadow(folder: Folder, index: int) -> tuple[NestedVM, int, NestedTable]:
    """An engine over the captured tables of L1 and of the host, with shadow ``index`` filled, and its context."""
    mem = GuestMemory()
    capture = mem.load_tables(folder, which="l1")
    nested, host = nested_of(capture, index), host_of(capture)
    l1 = next(vm for vm in capture.vms if (vm.vttbr, vm.vtcr) == (nested.l1_vttbr, nested.l1_vtcr))
    vm = NestedVM(mem, features=l1.features)
    vm.host.load(*host)
    add_devices(mem, vm.host.leaves(), capture.ram)
    context = vm.vcpus[0].load(l1.vttbr, l1.vtcr, hcr=l1.hcr).index
    fill(vm, l1, mem)
    return vm, context, nested


def add_devices(mem: GuestMemory, host: Rows, ram: tuple[int, int]) -> None:
    """What the host maps beside L1's RAM is a device (the virtual interrupt controller's page, say)."""
    start, end = host["cipa"], host["cipa"] + host["size"]
    for low, high in ((0, ram[0]), (ram[1], 1 << 64)):
        for at, to in zip(start.tolist(), end.tolist(), strict=True):
            if max(at, low) < min(to, high):
                mem.add(max(at, low), min(to, high) - max(at, low), device=True)


def fill(vm: NestedVM, l1: CapturedVM, mem: GuestMemory) -> None:
    """Fault in all that a leaf of L1's and a leaf of the host's map together."""
    guest = leaves(mem, l1.config())
    guest = guest[guest["perm"] != 0]
    at, end, perm = overlaps(guest, vm.host.leaves())
    masks = [int(READ), int(WRITE), int(EXEC)]          # numpy loses Ctrl-C where it asks members of enums
    access = np.select([perm & mask != 0 for mask in masks], masks, int(EXEC | EL0))
    while len(at):
        at = fault_once(vm.vcpus[0], at, access.astype(np.uint8))
        rest = at < end
        at, end, access = at[rest], end[rest], access[rest]


def fault_once(vcpu: VCPU, at: npt.NDArray[np.uint64], access: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Fault in each address -> the address behind what that mapped, or behind the page where nothing could be."""
    done = vcpu.fault_many(at, access)
    mapped = (done["kind"] == int(HIT)) | (done["kind"] == int(MAPPED))
    size = np.where(mapped, done["size"], np.uint64(4096))
    return (at // size + np.uint64(1)) * size


def overlaps(guest: Rows, host: Rows) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
    """(start, end, permissions) of the IPA ranges in which a leaf of L1's lies over one leaf of the host's."""
    low, high = guest["pa"], guest["pa"] + guest["size"]
    host_end = host["cipa"] + host["size"]
    first = np.searchsorted(host_end, low, side="right")
    count = np.maximum(np.searchsorted(host["cipa"], high, side="left") - first, 0)
    leaf = np.repeat(np.arange(len(guest)), count)
    under = np.arange(len(leaf)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    start = np.maximum(low[leaf], host["cipa"][under])
    end = np.minimum(high[leaf], host_end[under])
    to_ipa = guest["ipa"][leaf] - low[leaf]
    return start + to_ipa, end + to_ipa, guest["perm"][leaf]
