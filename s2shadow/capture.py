"""Captures: stage-2 tables of a real hypervisor, loaded into a ``GuestMemory``.

A capture is a snapshot folder:

``tables.npz``
    ``addresses`` uint64[N], ``pages`` uint8[N, 4096]: every stage-2 table page at its physical address.
``l1_tables.npz``
    Only where a guest hypervisor (L1) ran: the same for L1's own tables, at L1's physical addresses.
    ``tables.npz`` then holds what the host (L0) built: its table for L1, and the shadow tables.
``registers.json``
    VTTBR_EL2, VTCR_EL2 and HCR_EL2 of each VM (``vms``, ``nested``, ``l0_table_for_l1``) and ``ram_base``.

Captures are untrusted input: pickles are never read, and whatever is wrong raises ``CaptureError`` before
anything is added to the memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from s2shadow.config import Stage2Config
from s2shadow.constants import HCR_FWB, HCR_VM, size_text
from s2shadow.features import Features

if TYPE_CHECKING:
    from s2shadow.memory import GuestMemory

__all__ = ["Capture", "CaptureError", "CapturedVM", "HostTable", "NestedTable", "load_tables", "shipped"]

PAGE = 4096
RAM_ROUNDING = 2 << 20
ADDRESS_LIMIT = 1 << 52
FILE_OF = {"auto": None, "l1": "l1_tables.npz", "host": "tables.npz", "tables": "tables.npz"}


class CaptureError(ValueError):
    """A capture that is missing, damaged or contradicts itself; the text names the file and what is wrong."""


@dataclass(frozen=True, slots=True)
class CapturedVM:
    """One VM of a capture: the registers that its stage 2 runs under, and what its tables hold.

    ``vm`` is its number in the capture; ``vttbr``, ``vtcr`` and ``hcr`` are VTTBR_EL2, VTCR_EL2 and HCR_EL2, and
    ``vmid``, ``baddr``, ``granule`` (bytes), ``ipa_bits``, ``start_level`` (None where SL0 names none) and
    ``concatenated`` (start tables side by side) what they decode to under ``features``, the captured machine's.
    ``leaves`` maps a leaf size (``"4K"``) to how many there are; ``tables`` maps a level to its table pages,
    concatenated start tables counting as one (empty where the capture does not say).
    """

    vm: int
    vttbr: int
    vtcr: int
    hcr: int
    vmid: int
    baddr: int
    granule: int
    ipa_bits: int
    start_level: int | None
    concatenated: int
    features: Features
    leaves: Mapping[str, int]
    tables: Mapping[int, int]

    def config(self, features: Features | None = None) -> Stage2Config:
        """The registers decoded, by default under the features of the captured machine."""
        return Stage2Config(self.vttbr, self.vtcr, features=features or self.features, hcr=self.hcr)


@dataclass(frozen=True, slots=True)
class NestedTable:
    """One shadow table that the captured host built. ``vm`` is the number of the L2 in the capture, ``l1_vttbr`` and
    ``l1_vtcr`` name L1's table, ``shadow_vttbr`` the host's; ``l1_leaves`` and ``shadow_leaves`` count their leaves."""

    vm: int
    l1_vttbr: int
    l1_vtcr: int
    shadow_vttbr: int
    l1_leaves: int
    shadow_leaves: int


class HostTable(NamedTuple):
    """The captured host's own table for L1, in the order that ``vm.host.load(*capture.host)`` takes.

    ``addresses``: uint64[N] of its table pages; ``pages``: uint8[N, granule]; ``vttbr`` and ``vtcr``: its registers.
    """

    addresses: npt.NDArray[np.uint64]
    pages: npt.NDArray[np.uint8]
    vttbr: int
    vtcr: int


@dataclass(frozen=True, slots=True)
class Capture:
    """What ``load_tables`` found: ``vms``, a tuple of ``CapturedVM``; ``path``, the folder; ``ram``, the RAM around the
    tables as (start, end) in bytes. ``nested``, a tuple of ``NestedTable``, is empty and ``host``, a ``HostTable``,
    None unless a guest hypervisor ran."""

    vms: tuple[CapturedVM, ...]
    nested: tuple[NestedTable, ...]
    host: HostTable | None
    path: Path
    ram: tuple[int, int]

    def __repr__(self) -> str:
        leaves = sum(sum(vm.leaves.values()) for vm in self.vms)
        return f"Capture({self.path.name}: {len(self.vms)} VMs, {leaves:,} leaves, {len(self.nested)} nested)"


def shipped() -> Path:
    """Folder of the capture inside the package: a Linux guest's 4K mappings as Linux 7.2 wrote them."""
    from importlib.resources import files

    return Path(str(files("s2shadow"))) / "data" / "linux_l2_4k"


def load_tables(mem: GuestMemory, snapshot: str | os.PathLike[str], which: str = "auto") -> Capture:
    """Load a capture into ``mem`` -> ``Capture``.

    ``which``: ``"l1"`` loads l1_tables.npz, ``"host"`` (or ``"tables"``) tables.npz, ``"auto"`` the former where
    there is one. One sparse RAM region is added, from the capture's RAM base to the end of the highest table
    page or leaf output, rounded up to 2 MiB (captures name no RAM size); the table pages are written into it.
    Raises ``CaptureError`` and leaves ``mem`` alone if anything is wrong, an overlap with a region included.
    """
    if which not in FILE_OF:
        raise ValueError(f"which must be one of {', '.join(FILE_OF)}, got {which!r}")
    folder = Path(snapshot)
    check_folder(folder)
    registers = read_registers(folder / "registers.json")
    guest_file = folder / (FILE_OF[which] or ("l1_tables.npz" if (folder / "l1_tables.npz").exists() else "tables.npz"))
    if not guest_file.exists():
        raise CaptureError(f"no {guest_file.name} at {folder}: no guest hypervisor ran in this capture")
    addresses, pages = read_tables(guest_file)
    nested = read_nested(registers)
    if guest_file.name == "l1_tables.npz":
        vms = l1_vms(registers, nested, guest_file)
    else:
        vms = [read_vm(registers, i) for i in range(len(registers.list("vms")))]
    host = read_host(registers, folder, guest_file, addresses, pages)
    ram_base = registers.number("ram_base") if registers.has("ram_base") else align_down(int(addresses.min()))
    check_counts(vms, len(pages), registers)
    vms, end = survey(vms, addresses, pages, guest_file)
    if addresses.min() < ram_base:
        raise CaptureError(f"{guest_file}: table page {int(addresses.min()):#x} lies below ram_base {ram_base:#x} "
                           f"of {registers.file.name}")
    ram = (ram_base, -(-end // RAM_ROUNDING) * RAM_ROUNDING)
    add_ram(mem, ram, addresses, pages, folder)
    return Capture(tuple(vms), nested, host, folder, ram)


def check_folder(folder: Path) -> None:
    if folder.is_file():
        raise CaptureError(f"no capture at {folder}: it is a file; name the folder that holds tables.npz")
    for name in ("tables.npz", "registers.json"):
        if not (folder / name).is_file():
            inside = sorted(p.parent.name for p in folder.glob("*/tables.npz")) if folder.is_dir() else []
            hint = f" (snapshots inside: {inside[0]} … {inside[-1]})" if inside else ""
            raise CaptureError(f"no capture at {folder}: {name} is missing{hint}")


def align_down(address: int) -> int:
    return address & ~(RAM_ROUNDING - 1)


# --- tables.npz ------------------------------------------------------------------------------------------------


def read_tables(file: Path) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
    """``addresses`` and ``pages`` of an archive, checked and in the order of the addresses."""
    addresses, pages = read_arrays(file, "addresses", "pages")
    if addresses.dtype != np.uint64 or addresses.ndim != 1:
        raise CaptureError(f"{file}: addresses must be uint64[N], got {shape_text(addresses)}")
    if pages.dtype != np.uint8 or pages.ndim != 2 or pages.shape[1] != PAGE:
        raise CaptureError(f"{file}: pages must be uint8[N, {PAGE}], got {shape_text(pages)}")
    if len(addresses) != len(pages):
        raise CaptureError(f"{file}: {len(addresses)} addresses but {len(pages)} pages")
    if not len(addresses):
        raise CaptureError(f"{file}: no table pages")
    unaligned = addresses[addresses % PAGE != 0]
    if len(unaligned):
        raise CaptureError(f"{file}: address {int(unaligned[0]):#x} is not aligned to {PAGE} bytes")
    order = np.argsort(addresses, kind="stable")
    addresses, pages = addresses[order], np.ascontiguousarray(pages[order])
    repeated = addresses[1:][addresses[1:] == addresses[:-1]]
    if len(repeated):
        raise CaptureError(f"{file}: address {int(repeated[0]):#x} appears twice")
    if int(addresses[-1]) + PAGE > ADDRESS_LIMIT:
        raise CaptureError(f"{file}: address {int(addresses[-1]):#x} is beyond 52 bits")
    return addresses, pages


def read_arrays(file: Path, *names: str) -> list[npt.NDArray[Any]]:
    """Arrays of an .npz, never through pickle; every way in which the archive can be broken is a CaptureError."""
    arrays: list[npt.NDArray[Any]] = []
    try:
        with open(file, "rb") as stream:        # ours to close: numpy leaves a broken archive open
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise CaptureError(f"{file} is damaged: a single array, not an .npz archive")
            for name in names:
                if name not in archive.files:
                    raise CaptureError(f"{file}: array {name!r} is missing")
                array = archive[name]
                if not isinstance(array, np.ndarray):       # numpy gives the bytes of what has no header of its own
                    raise CaptureError(f"{file} is damaged: {name!r} is no array")
                arrays.append(array)
    except CaptureError:
        raise
    except MemoryError:
        raise CaptureError(f"{file} is damaged: it declares more data than fits into memory") from None
    except Exception as error:      # zip, zlib, header and format errors have no common base
        raise CaptureError(f"{file} is damaged: {one_line(error)}") from None
    return arrays


def shape_text(array: npt.NDArray[Any]) -> str:
    return f"{array.dtype}[{', '.join(str(n) for n in array.shape)}]"


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# --- registers.json --------------------------------------------------------------------------------------------


class Fields:
    """One JSON object with checked access; messages name the file and the field's path."""

    def __init__(self, file: Path, where: str, data: object):
        if not isinstance(data, dict):
            raise CaptureError(f"{file}: {where or 'the file'} must be an object, got {type(data).__name__}")
        self.file = file
        self.where = where
        self.data = data

    def path(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name

    def has(self, name: str) -> bool:
        return self.data.get(name) is not None

    def get(self, name: str) -> object:
        if not self.has(name):
            raise CaptureError(f"{self.file}: {self.path(name)} is missing")
        return self.data[name]

    def number(self, name: str, limit: int = 1 << 64) -> int:
        """An integer, or text that holds one (hexadecimal with 0x)."""
        value = self.get(name)
        try:
            number = int(value, 0) if isinstance(value, str) else value
        except ValueError:
            number = None
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < limit:
            raise CaptureError(f"{self.file}: {self.path(name)} must be a number below 2^{limit.bit_length() - 1}, "
                               f"got {value!r}")
        return number

    def object(self, name: str) -> Fields:
        return Fields(self.file, self.path(name), self.get(name))

    def list(self, name: str) -> list[Fields]:
        value = self.get(name)
        if not isinstance(value, list):
            raise CaptureError(f"{self.file}: {self.path(name)} must be a list, got {type(value).__name__}")
        return [Fields(self.file, f"{self.path(name)}[{i}]", item) for i, item in enumerate(value)]

    def counts(self, name: str) -> dict[str, int]:
        if not self.has(name):
            return {}
        counts = self.object(name)
        return {key: counts.number(key) for key in counts.data}


def read_registers(file: Path) -> Fields:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CaptureError(f"{file} cannot be read: {one_line(error)}") from None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CaptureError(f"{file} is not JSON: {one_line(error)}") from None
    registers = Fields(file, "", data)
    if not registers.has("vms"):
        raise CaptureError(f"{file}: vms is missing")
    if not registers.list("vms"):
        raise CaptureError(f"{file}: vms is empty")
    return registers


def read_vm(registers: Fields, index: int) -> CapturedVM:
    fields = registers.list("vms")[index]
    tables = fields.counts("tables_by_level")
    try:
        levels = {int(level): count for level, count in tables.items()}
    except ValueError:
        raise CaptureError(f"{fields.file}: {fields.path('tables_by_level')} must be keyed by level") from None
    hcr = fields.number("hcr_el2") if fields.has("hcr_el2") else HCR_VM
    vm = fields.number("vm") if fields.has("vm") else index
    return make_vm(vm, fields.number("vttbr_el2"), fields.number("vtcr_el2"), hcr,
                   fields.counts("leaves"), levels)


def read_nested(registers: Fields) -> tuple[NestedTable, ...]:
    if not registers.has("nested"):
        return ()
    return tuple(NestedTable(vm=fields.number("vm"), l1_vttbr=fields.number("l1_vttbr_el2"),
                             l1_vtcr=fields.number("l1_vtcr_el2"), shadow_vttbr=fields.number("shadow_vttbr_el2"),
                             l1_leaves=fields.number("l1_leaves") if fields.has("l1_leaves") else 0,
                             shadow_leaves=fields.number("shadow_leaves") if fields.has("shadow_leaves") else 0)
                 for fields in registers.list("nested"))


def l1_vms(registers: Fields, nested: tuple[NestedTable, ...], guest_file: Path) -> list[CapturedVM]:
    """L1's VMs by the registers that L1 wrote. Its HCR_EL2 was not recorded; VM and FWB set fit what it mapped."""
    if not nested:
        raise CaptureError(f"{registers.file}: nested is missing, so nothing names the tables of {guest_file.name}")
    unique = {(table.vm, table.l1_vttbr, table.l1_vtcr): None for table in nested}
    return [make_vm(vm, vttbr, vtcr, HCR_VM | HCR_FWB, {}, {}) for vm, vttbr, vtcr in unique]


def make_vm(vm: int, vttbr: int, vtcr: int, hcr: int, leaves: dict[str, int], tables: dict[int, int]) -> CapturedVM:
    features = features_of(vtcr)
    cfg = Stage2Config(vttbr, vtcr, features=features, hcr=hcr)
    return CapturedVM(vm=vm, vttbr=vttbr, vtcr=vtcr, hcr=hcr, vmid=cfg.vmid, baddr=cfg.baddr, granule=cfg.granule,
                      ipa_bits=cfg.ia_bits, start_level=cfg.start_level, concatenated=cfg.concatenated,
                      features=features, leaves=MappingProxyType(leaves), tables=MappingProxyType(tables))


def features_of(vtcr: int) -> Features:
    """What the captured machine must have had: a hypervisor sets VTCR_EL2.DS only with FEAT_LPA2."""
    if vtcr >> 32 & 1:
        return Features(pa_bits=52, lpa=True, lpa2=True)
    return Features()


def read_host(registers: Fields, folder: Path, guest_file: Path, addresses: npt.NDArray[np.uint64],
              pages: npt.NDArray[np.uint8]) -> HostTable | None:
    if not registers.has("l0_table_for_l1"):
        return None
    fields = registers.object("l0_table_for_l1")
    if guest_file.name != "tables.npz":
        addresses, pages = read_tables(folder / "tables.npz")
    vttbr, vtcr = fields.number("vttbr_el2"), fields.number("vtcr_el2")
    check_root(Stage2Config(vttbr, vtcr, features=features_of(vtcr)), addresses, folder / "tables.npz", "L0's table")
    return HostTable(addresses, pages, vttbr, vtcr)


# --- into memory -----------------------------------------------------------------------------------------------


def survey(vms: list[CapturedVM], addresses: npt.NDArray[np.uint64], pages: npt.NDArray[np.uint8],
           file: Path) -> tuple[list[CapturedVM], int]:
    """Walk every VM's tables in a scratch memory: the VMs with their leaf counts, and the end of what is used."""
    from s2shadow.memory import GuestMemory
    from s2shadow.walker import leaves

    end = int(addresses[-1]) + PAGE
    for vm in vms:
        check_root(vm.config(), addresses, file, f"the table of VM {vm.vm}")
    scratch = GuestMemory()
    start = align_down(int(addresses[0]))
    add_ram(scratch, (start, end), addresses, pages, file)
    found = []
    for vm in vms:
        try:
            rows = leaves(scratch, vm.config(), most_leaves(len(pages)))
        except ValueError as error:
            raise CaptureError(f"{file}: the table of VM {vm.vm} is damaged: {one_line(error)}") from None
        if len(rows):
            end = max(end, int((rows["pa"] + rows["size"]).max()))
        found.append(vm if vm.leaves else with_leaves(vm, rows["size"]))
    return found, end


def most_leaves(pages: int) -> int:
    """Beyond this tables loop: as many as so many pages of entries hold, with each page in sixteen places."""
    return min(1 << 24, 16 * PAGE // 8 * pages)


def check_root(cfg: Stage2Config, addresses: npt.NDArray[np.uint64], file: Path, what: str) -> None:
    """The start table must be among the pages: else the registers belong to other tables."""
    if cfg.error is None:
        at = int(np.searchsorted(addresses, cfg.baddr & ~(PAGE - 1)))
        if at == len(addresses) or addresses[at] != cfg.baddr & ~(PAGE - 1):
            raise CaptureError(f"{file}: {what} at {cfg.baddr:#x}, which registers.json names, is not in it")


def check_counts(vms: list[CapturedVM], pages: int, registers: Fields) -> None:
    """``tables_by_level`` is believed where it can be: a VM has no more tables than there are pages."""
    for vm in vms:
        if sum(vm.tables.values()) * vm.granule > pages * PAGE:
            raise CaptureError(f"{registers.file}: tables_by_level of VM {vm.vm} counts more tables than "
                               f"the {pages:,} pages of the capture hold")


def with_leaves(vm: CapturedVM, sizes: npt.NDArray[np.uint64]) -> CapturedVM:
    from dataclasses import replace

    values, counts = np.unique(sizes, return_counts=True)
    leaves = {size_text(int(size)): int(count) for size, count in zip(values, counts, strict=True)}
    return replace(vm, leaves=MappingProxyType(leaves))


def add_ram(mem: GuestMemory, ram: tuple[int, int], addresses: npt.NDArray[np.uint64],
            pages: npt.NDArray[np.uint8], where: Path) -> None:
    """One sparse region with the pages in it; adjacent pages go in one write."""
    start, end = ram
    try:
        mem.add(start, end - start)
    except ValueError as error:
        raise CaptureError(f"{where} cannot be loaded: {one_line(error)}") from None
    except MemoryError:
        raise CaptureError(f"{where} cannot be loaded: its RAM would span [{start:#x}, {end:#x})") from None
    breaks = np.flatnonzero(np.diff(addresses) != PAGE) + 1
    for run, data in zip(np.split(addresses, breaks), np.split(pages, breaks), strict=True):
        mem.write(int(run[0]), data)
