"""What Linux 7.2 drops needlessly on the TLBIs that a real guest hypervisor issued.

    python bench/tlbi_streams.py                       # the stream in bench/data
    python bench/tlbi_streams.py --captures FOLDER     # whole streams: FOLDER/NAME/tlbi.csv.xz and its snapshots

Two engines, ``tlbi="exact"`` and ``tlbi="kvm72"``, shadow the same captured tables of L1 over a host that maps
everything in blocks of up to 2 MiB. Each IPA or range operation of the stream goes to both, with the registers that L1
had when it issued it. Then what went is faulted in again (L2 touches its working set between two operations), so that
the next one finds both as full as before; the faults that this took are counted.

Which tables: L1 invalidates what it had mapped, but a snapshot is not of that moment. So each operation runs on the
last snapshot before it, if L1's tables have a leaf there where the operation points, else on the one after it, else
on the nearest that has; if none has, on the last one before it.

How full the shadows are decides what Linux does: where it finds the named leaf it takes the leaf's size, and where it
does not, the largest size it knows. A shadow lacks leaves that L2 did not use since L1 mapped them, and those that a
host change or an earlier TLBI took along. ``--shadowed F`` keeps a random fraction F of the leaves in the working set
(default 1: the best case for Linux). Operations whose named leaf was not in the shadows are shown apart.
"""

import argparse
import csv
import json
import lzma
import sys
import time
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

import s2shadow as s2
from s2shadow.capture import load_tables
from s2shadow.report import columns
from s2shadow.storm import shadow_features

HERE = Path(__file__).parent
SHIPPED = HERE / "data" / "b2_linux_l2_4k_7.2.tlbi.npz"
SNAPSHOTS = HERE.parent / "tests" / "data" / "captures"
NAMES = ("a_storm_max_7.2", "b2_linux_l2_4k_7.2", "b_linux_l2_thp_7.2")
REACHES = (1 << 12, 1 << 21, 1 << 30, 1 << 52)  # around the address named, until every leaf that went is found
HEADINGS = ("operation", "named leaf", "operations", "required", "exact", "Linux 7.2", "needless", "needless/op",
            "refaults exact", "refaults Linux", "removed/required")  # fmt: skip


# --- the stream ------------------------------------------------------------------------------------------------


def read_stream(path):
    """(seq, ``TLBI_OP_DTYPE``) of the stage-2 TLBIs that L1 executed at EL2; by instruction word, not by name."""
    seqs, rows = [], []
    with lzma.open(path, "rt", encoding="ascii", newline="") as lines:
        for row in csv.DictReader(lines):
            insn = int(row["insn"], 16)
            if row["event"] != "TLBI" or row["el"] != "2" or s2.decode_tlbi(insn).regime not in ("EL10_S2", "EL10_S12"):
                continue
            registers = (int(row[name], 16) for name in ("vttbr_el2", "vtcr_el2", "hcr_el2"))
            rows.append((0, 1, insn, int(row["xt"], 16), *registers))
            seqs.append(int(row["seq"]))
    return np.array(seqs, dtype=np.uint64), np.array(rows, dtype=s2.TLBI_OP_DTYPE)


def load_stream(path):
    with np.load(path) as file:
        return file["seq"], file["ops"].astype(s2.TLBI_OP_DTYPE)


@dataclass
class Kind:
    """What kind of operation a row is, for the table."""

    name: str
    start: int
    end: int


def kind_of(insn, xt, vtcr):
    tlbi = s2.decode_tlbi(int(insn), int(xt), vtcr=int(vtcr))
    if tlbi.scope != "IPA":
        return Kind(tlbi.scope, 0, 1 << 64)
    hint = "without TTL" if tlbi.level is None else f"TTL level {tlbi.level}"
    stem = "RIPAS2E1" if tlbi.name.startswith("R") else "IPAS2E1"
    return Kind(f"{stem} {hint}", tlbi.start or 0, tlbi.end or 0)


# --- the engines -----------------------------------------------------------------------------------------------


class Intervals:
    """Disjoint [start, end), sorted."""

    def __init__(self, starts, sizes):
        self.starts, self.ends = starts.copy(), starts + sizes

    def meet(self, start, end):
        return bool(np.searchsorted(self.ends, start, side="right") < np.searchsorted(self.starts, end))


def l1_leaves(snapshot):
    """{VMID: ``Intervals``} of L1's tables."""
    mem = s2.GuestMemory()
    capture = load_tables(mem, snapshot)
    rows = {l1.vmid: s2.leaves(mem, l1.config()) for l1 in capture.vms}
    return {vmid: Intervals(found["ipa"], found["size"]) for vmid, found in rows.items()}


class Side:
    """One engine over one snapshot: every VM of it in a context that holds its working set."""

    def __init__(self, snapshot, mode, shadowed=1.0):
        mem = s2.GuestMemory()
        capture = load_tables(mem, snapshot)
        features = shadow_features(capture.vms[0].features)
        self.vm = s2.NestedVM(mem, vcpus=len(capture.vms), features=features, tlbi=mode, track_tlbis=False)
        self.vm.host.populate = s2.Linear()
        rng = np.random.default_rng(1)
        self.contexts = {}
        for vcpu, l1 in zip(self.vm.vcpus, capture.vms, strict=True):
            context = vcpu.load(l1.vttbr, l1.vtcr, hcr=l1.hcr)
            ipas = pieces(s2.leaves(mem, l1.config(features)))
            vcpu.fault_many(ipas[rng.random(len(ipas)) < shadowed], s2.READ)
            shadow = self.vm.shadow(context.index)  # device pages are left out
            self.contexts[l1.vmid] = vcpu, shadow["ipa"].copy(), Intervals(shadow["ipa"], shadow["size"])
        self.full = self.vm.stats.live

    def apply(self, row, kind):
        """One operation, and L2's touch of what went -> (leaves removed, required, faulted in)."""
        vmid = vmid_of(row)
        vcpu = self.contexts[vmid][0]
        result = vcpu.tlbi(int(row["insn"]), int(row["xt"]), int(row["vttbr"]), int(row["vtcr"]), int(row["hcr"]))
        refaults = self.refault(vmid, kind, result.removed) if result.removed else 0
        if self.vm.stats.live != self.full:
            raise RuntimeError(f"{self.vm.stats.live:,} leaves of {self.full:,} are live after {kind.name}")
        return result.removed, result.required, refaults

    def refault(self, vmid, kind, missing):
        """Fault in what went, looking ever further around what was named -> how many leaves."""
        vcpu, ipas, _ = self.contexts[vmid]
        found = 0
        for reach in REACHES:
            low = np.searchsorted(ipas, kind.start & -reach)
            high = np.searchsorted(ipas, (kind.end - 1 | reach - 1) + 1)
            found += touch(vcpu, ipas[low:high])
            if found >= missing:
                break
        return found


def touch(vcpu, ipas):
    return int(np.count_nonzero(vcpu.fault_many(ipas, s2.READ)["kind"] == s2.MAPPED)) if len(ipas) else 0


def vmid_of(row):
    return int(row["vttbr"]) >> 48


def pieces(rows):
    """One address for each shadow leaf that L1's leaves can become over blocks of at most 2 MiB."""
    leaves = zip(rows["ipa"].tolist(), rows["size"].tolist(), strict=True)
    return np.concatenate([np.arange(ipa, ipa + size, 2 << 20, dtype=np.uint64) for ipa, size in leaves])


@dataclass
class Row:
    """Counts of one kind of operation."""

    operations: int = 0
    required: int = 0
    exact: int = 0
    kvm72: int = 0
    refaults_exact: int = 0
    refaults_kvm72: int = 0

    @property
    def needless(self):
        return self.kvm72 - self.required

    def add(self, other):
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def choose_snapshots(seqs, ops, kinds, snapshots):
    """For each operation the number of the snapshot that it runs on, -1 where none has its VM."""
    ends = [json.loads((snapshot / "registers.json").read_text())["plugin_seq"] for snapshot in snapshots]
    tables = [l1_leaves(snapshot) for snapshot in snapshots]
    chosen = []
    for seq, row, kind in zip(seqs.tolist(), ops, kinds, strict=True):
        vmid = vmid_of(row)
        after = bisect_left(ends, seq)
        order = sorted(range(len(snapshots)), key=lambda n: (abs(n - after + 0.6), n))  # last before, next after, ...
        able = [n for n in order if vmid in tables[n]]
        having = (n for n in able if tables[n][vmid].meet(kind.start, kind.end))
        chosen.append(next(having, able[0] if able else -1))
    return np.array(chosen)


def replay(seqs, ops, snapshots, shadowed=1.0):
    """({(kind, whether the shadow had what it names): Row}, operations that name a VM of no snapshot)"""
    table = defaultdict(Row)
    kinds = [kind_of(row["insn"], row["xt"], row["vtcr"]) for row in ops]
    chosen = choose_snapshots(seqs, ops, kinds, snapshots)
    for n in sorted(set(chosen[chosen >= 0].tolist())):
        exact, kvm72 = (Side(snapshots[n], mode, shadowed) for mode in ("exact", "kvm72"))
        for i in np.flatnonzero(chosen == n).tolist():
            kind = kinds[i]
            there = exact.contexts[vmid_of(ops[i])][2].meet(kind.start, kind.end)
            removed, required, refaults = exact.apply(ops[i], kind)
            removed_kvm72, _, refaults_kvm72 = kvm72.apply(ops[i], kind)
            table[kind.name, there].add(Row(1, required, removed, removed_kvm72, refaults, refaults_kvm72))
    return table, int(np.count_nonzero(chosen < 0))


# --- the table -------------------------------------------------------------------------------------------------


def table_rows(table):
    total = Row()
    for row in table.values():
        total.add(row)
    order = sorted(table, key=lambda key: (key[0], not key[1]))
    rows = [cells(name, "shadowed" if there else "not shadowed", table[name, there]) for name, there in order]
    return [HEADINGS, *rows, cells("all", "", total)]


def cells(name, leaf, row):
    ratio = f"{row.kvm72 / row.required:,.2f}" if row.required else "-"
    per_operation = f"{row.needless / row.operations:,.1f}" if row.operations else "-"
    counts = (row.operations, row.required, row.exact, row.kvm72, row.needless)
    return (name, leaf, *(f"{count:,}" for count in counts), per_operation,
            f"{row.refaults_exact:,}", f"{row.refaults_kvm72:,}", ratio)  # fmt: skip


def markdown(rows):
    heading, *body = rows
    lines = [heading, ("---", "---", *["---:"] * (len(heading) - 2)), *body]
    return [f"| {' | '.join(line)} |" for line in lines]


def main(argv=None):
    parser = argparse.ArgumentParser(description="What Linux 7.2 drops needlessly on captured TLBIs.")
    parser.add_argument("--captures", type=Path, metavar="FOLDER", help="whole captures, each with tlbi.csv.xz")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="of these captures")
    parser.add_argument("--shadowed", type=float, default=1.0, metavar="F", help="fraction of leaves in the shadows")
    parser.add_argument("--limit", type=int, metavar="N", help="N operations of each stream, picked at random")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    options = parser.parse_args(argv)
    if options.captures is None:
        streams = [("b2_linux_l2_4k_7.2, first 20,000", load_stream(SHIPPED), SNAPSHOTS / "b2_linux_l2_4k_7.2")]
    else:
        streams = (
            (name, read_stream(options.captures / name / "tlbi.csv.xz"), options.captures / name)
            for name in options.only or NAMES
        )
    for name, (seqs, ops), folder in streams:
        began = time.monotonic()
        if options.limit and options.limit < len(ops):
            picked = np.sort(np.random.default_rng(1).choice(len(ops), options.limit, replace=False))
            seqs, ops = seqs[picked], ops[picked]
        snapshots = sorted(path.parent for path in folder.glob("*/tables.npz"))
        table, strangers = replay(seqs, ops, snapshots, options.shadowed)
        rows = table_rows(table)
        print(f"### {name}, {options.shadowed:.0%} shadowed\n" if options.markdown else name)
        print("\n".join(markdown(rows) if options.markdown else columns(rows)))
        if strangers:
            print(f"\n{strangers:,} operations named a VM that no snapshot has.")
        print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
        print(flush=True)


if __name__ == "__main__":
    main()
