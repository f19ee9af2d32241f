"""What a replay reads: the files of a trace, and what lies beside them in a capture.

A capture folder holds ``trace.txt`` and ``tlbi.csv`` (either may be missing; plain, .gz or .xz), ``memslots.json``,
``checks.json``, and snapshot folders ``NN_name`` with the stage-2 tables of that moment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from s2shadow.capture import (
    Capture,
    CapturedVM,
    CaptureError,
    Fields,
    check_folder,
    load_tables,
    one_line,
    read_registers,
    read_tables,
)
from s2shadow.memslots import Memslots

if TYPE_CHECKING:
    from s2shadow.trace import TraceReader

__all__ = ["Recording", "Snapshot", "open_recording", "read_snapshot"]

TEXT_NAMES = ("trace.txt", "trace.txt.xz", "trace.txt.gz", "trace.npz", "trace.parquet")
TABLE_NAMES = ("tlbi.csv", "tlbi.csv.xz", "tlbi.csv.gz")
BADDR = 0x0000_FFFF_FFFF_FFFE


# --- snapshots -------------------------------------------------------------------------------------------------


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CaptureError(f"{file} cannot be read: {one_line(error)}") from None
    except (ValueError, RecursionError) as error:
        raise CaptureError(f"{file} is not JSON: {one_line(error)}") from None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The tables of one moment. ``seq``: the last row of the CSV before it (None: not known); ``running``: whether the
    workload went on meanwhile."""

    name: str
    path: Path
    seq: int | None
    running: bool = False

    def guest(self) -> tuple[Capture, dict[int, npt.NDArray[np.void]]]:
        """The capture, and L1's leaves by root (``LEAF_DTYPE``)."""
        return self.leaves("auto")

    def host(self) -> tuple[Capture, dict[int, npt.NDArray[np.void]]]:
        """The capture, and by root the leaves of the tables that the host built (shadows, and its own for L1)."""
        from s2shadow.memory import GuestMemory
        from s2shadow.walker import leaves

        capture, found = self.leaves("host")
        if capture.host is not None:
            mem = GuestMemory()
            for address, page in zip(capture.host.addresses.tolist(), capture.host.pages, strict=True):
                mem.add(address, buffer=page)
            cfg = host_config(capture)
            found[cfg.baddr] = leaves(mem, cfg)
        return capture, found

    def leaves(self, which: str) -> tuple[Capture, dict[int, npt.NDArray[np.void]]]:
        from s2shadow.memory import GuestMemory
        from s2shadow.walker import leaves

        mem = GuestMemory()
        capture = load_tables(mem, self.path, which)
        return capture, {vm.baddr: leaves(mem, vm.config()) for vm in capture.vms}

    def guest_pages(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
        """L1's table pages and their addresses."""
        own = self.path / "l1_tables.npz"
        return read_tables(own if own.exists() else self.path / "tables.npz")


def host_config(capture: Capture) -> Any:
    from s2shadow.capture import features_of
    from s2shadow.config import Stage2Config
    from s2shadow.constants import HCR_FWB, HCR_VM

    assert capture.host is not None
    return Stage2Config(capture.host.vttbr, capture.host.vtcr, features=features_of(capture.host.vtcr),
                        hcr=HCR_VM | HCR_FWB)


def read_snapshot(folder: Path) -> Snapshot:
    check_folder(folder)
    registers = read_registers(folder / "registers.json")
    prefix, _, name = folder.name.partition("_")
    return Snapshot(name if prefix.isdigit() and name else folder.name, folder,
                    registers.number("plugin_seq") if registers.has("plugin_seq") else None,
                    registers.data.get("quiesced") is False)


# --- the whole -------------------------------------------------------------------------------------------------


def read_checks(file: Path) -> dict[str, Any]:
    """checks.json: how many of each event the machine had, and what the packed files leave out of them."""
    fields = Fields(file, "", read_json(file))
    left_out = fields.get("left_out_of_trace") if fields.has("left_out_of_trace") else []
    if not (isinstance(left_out, list) and all(isinstance(name, str) for name in left_out)):
        raise CaptureError(f"{file}: left_out_of_trace must be a list of names")
    counts = {name: fields.counts(name) for name in ("ftrace", "trap_stream")}
    for name in counts["trap_stream"]:
        words = name.split()
        if not words or (words[0] == "TLBI" and len(words) != 3):
            raise CaptureError(f"{file}: trap_stream must be keyed as 'TLBI vmalle1is el2', got {name!r}")
    return {"left_out_of_trace": left_out, **counts}


@dataclass(frozen=True, slots=True)
class Recording:
    """A trace and what belongs to it. ``text`` and ``table``: files, or None."""

    label: str
    text: str | None
    table: str | None
    snapshots: Sequence[Snapshot] = ()
    memslots: Memslots = field(default_factory=lambda: Memslots(()))
    checks: dict[str, Any] | None = None
    nested: bool | None = None              # a guest hypervisor ran in the traced machine; None: not known
    known_vms: Sequence[CapturedVM] = field(default=())
    cpus: int | None = None

    def readers(self, progress: Any) -> tuple[TraceReader | None, TraceReader | None]:
        from s2shadow.trace import read_trace

        text = None if self.text is None else read_trace(self.text, progress=progress)
        own = None if self.text is not None else progress
        return text, None if self.table is None else read_trace(self.table, progress=own)


def open_recording(trace: str | os.PathLike[str]) -> Recording:
    """Find what belongs to TRACE: a capture folder, or one file (text, CSV or saved events; ``-`` is stdin).

    ``CaptureError`` where there is no trace, or where a file beside it is damaged.
    """
    name = os.fspath(trace)
    path = Path(name)
    if name == "-" or not path.is_dir():
        return Recording("stdin" if name == "-" else path.name, name, None)
    text, table = first_of(path, TEXT_NAMES), first_of(path, TABLE_NAMES)
    if text is None and table is None:
        raise CaptureError(f"no trace at {path}: neither trace.txt nor tlbi.csv is there{hint(path)}")
    snapshots = [read_snapshot(folder) for folder in snapshot_folders(path)]
    vms, nested, cpus = [], None, None
    for snapshot in snapshots:
        registers = read_registers(snapshot.path / "registers.json")
        nested = registers.has("nested") or bool(nested)
        cpus = len(registers.object("vcpus").data) if registers.has("vcpus") else cpus
    if snapshots and not nested:
        for snapshot in snapshots:
            vms += load_vms(snapshot)
    slots = path / "memslots.json"
    checks = path / "checks.json"
    return Recording(path.name, text, table, tuple(snapshots), Memslots.load(slots) if slots.exists() else Memslots(()),
                     read_checks(checks) if checks.exists() else None, nested, tuple(vms), cpus or None)


def first_of(folder: Path, names: Sequence[str]) -> str | None:
    return next((str(folder / name) for name in names if (folder / name).is_file()), None)


def snapshot_folders(folder: Path) -> Iterator[Path]:
    return iter(sorted(file.parent for file in folder.glob("*/tables.npz")))


def hint(folder: Path) -> str:
    if next(snapshot_folders(folder), None) is not None:
        return " (only snapshots; its event files were left out)"
    inside = sorted(file.parent.name for file in folder.glob("*/trace.txt*"))
    return f" (captures inside: {', '.join(inside[:3])}{' …' if len(inside) > 3 else ''})" if inside else ""


def load_vms(snapshot: Snapshot) -> list[CapturedVM]:
    from s2shadow.capture import read_vm

    registers = read_registers(snapshot.path / "registers.json")
    return [read_vm(registers, i) for i in range(len(registers.list("vms")))]
