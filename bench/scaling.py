"""How cost grows: a notifier with contexts, pages and aliases; a fault with the memory that tables and links take.

    python bench/scaling.py --json FILE             # up to 4M pages, 8 GiB: 20 minutes, 12 GiB of memory
    python bench/scaling.py --small                 # a minute
    python bench/scaling.py --instructions --json FILE      # the same in instructions, where valgrind can be had

Where the design says O(1) the curve of instructions is flat. That of time is not: it rises with the misses, as the
floor beside it does, which is the same work by the least code there is, on as much memory.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from time import perf_counter_ns

import numpy as np

import s2shadow as s2
from beds import scattered
from nest import DATA, HCR, PAGE, Nest, u64
from s2shadow._floor import Lean, LeanWalk, fault_each, tlbi_each, unmap_each

IPAS2E1IS = 0xD50C8020
EVENTS = 1 << 10
ROUNDS = 7
SAMPLE = 1 << 18
TOTAL_LEAVES = 1 << 20
FOOTPRINT_PER_PAGE = 36     # guest, host and shadow entry, link: 8 bytes each; head: 4


def timed(call):
    began = perf_counter_ns()
    call()
    return perf_counter_ns() - began


def point(x, ns, floor, **more):
    return {"x": x, "ns": round(ns, 2), "floor_ns": round(floor, 2), **more}


# --- notifiers ---------------------------------------------------------------------------------------------------


def notifier(x, nest, leaves=1):
    """ns for a notifier on a page with ``leaves`` shadow leaves, and for the same removals in bare C."""
    events = min(EVENTS, len(nest.canonical) // 4)
    order = nest.canonical[scattered(len(nest.canonical))]
    lean = Lean(None, DATA, len(nest.canonical), len(nest.ipas) * len(nest.roots), len(nest.roots))
    for context in range(len(nest.roots)):
        lean.fill(nest.ipas + np.uint64(context << 39), nest.outputs(context))
    took, floor = [], []
    for i in range(ROUNDS):
        starts = u64(np.roll(order, -i * events)[:events])
        took.append(timed(lambda starts=starts: unmap_each(nest.state, starts, PAGE)))
        for start in starts.tolist():
            nest.vm.host.map(start, start + PAGE, PAGE)
        contexts, ipas = nest.where(starts)
        for context in np.unique(contexts).tolist():
            nest.vm.vcpus[context].fault_many(ipas[contexts == context], s2.READ)
        ns, removed = lean.removals(starts)
        assert removed == events * leaves
        floor.append(ns)
        lean.fill(ipas + (contexts.astype(np.uint64) << np.uint64(39)), nest.outputs_at(contexts, ipas))
    return point(x, min(took) / events, min(floor), leaves=leaves)


def full(pages, **options):
    return Nest(pages, track_tlbis=False, **options).fill()


def notifier_by_contexts(most):
    """1,048,576 leaves in all: only the number of contexts differs."""
    for contexts in powers(1, most, 4):
        yield notifier(contexts, full(TOTAL_LEAVES // contexts, contexts=contexts))


def notifier_by_pages(most):
    for pages in powers(1 << 10, most, 4):
        yield notifier(pages, full(pages))


def notifier_by_aliases(most):
    """As many leaves go as there are aliases; 1,048,576 leaves in all."""
    for aliases in powers(1, most, 4):
        yield notifier(aliases, full(TOTAL_LEAVES // aliases, aliases=aliases), leaves=aliases)


# --- faults ------------------------------------------------------------------------------------------------------


def scrambled(count):
    """0 to count - 1 (a power of two) in a scattered order, without the memory of a shuffle."""
    bits = count.bit_length() - 1
    i = np.arange(count, dtype=np.uint64)
    for _ in range(2):
        i *= np.uint64(0x9E3779B97F4A7C15)
        i &= np.uint64(count - 1)
        i ^= i >> np.uint64(max(1, bits // 2))
    return i


def fault_by_footprint(most):
    """Random leaves of a full context are dropped by TLBIs, which leave the tables, and faulted in again."""
    pages = 1 << 15
    while pages * FOOTPRINT_PER_PAGE <= most * 1.25:
        yield fault_point(pages)
        pages *= 2 if pages * FOOTPRINT_PER_PAGE < 1 << 28 else 4


def fault_point(pages):
    nest = Nest(pages, order=scrambled, track_tlbis=False)
    vcpu = nest.vm.vcpus[0]
    for at in range(0, pages, 1 << 22):
        vcpu.fault_many(nest.ipas[at : at + (1 << 22)], s2.READ)
    assert nest.vm.stats.live == pages
    sample = min(SAMPLE, pages // 4)
    out = np.empty(sample, dtype=s2.FAULT_DTYPE)
    single, batch = [], []
    for i in range(2 * ROUNDS):
        ipas = some(nest.ipas, sample, seed=i)
        assert tlbi_each(nest.state, IPAS2E1IS, ipas >> np.uint64(12), nest.vttbrs[0], nest.vtcr, HCR) == len(ipas)
        if i % 2:
            single.append(timed(lambda ipas=ipas: fault_each(nest.state, 0, ipas, s2.READ, s2.MAPPED)) / len(ipas))
        else:
            batch.append(timed(lambda ipas=ipas: vcpu.fault_many(ipas, s2.READ, out=out[: len(ipas)])) / len(ipas))
    assert nest.vm.stats.live == pages
    floor, overlapped = fault_floor(nest, ipas)
    return point(pages * FOOTPRINT_PER_PAGE, min(batch), overlapped, pages=pages, single_ns=round(min(single), 2),
                 serial_floor_ns=round(floor, 2))  # fmt: skip


def some(ipas, count, seed):
    """About ``count`` of them, each once, in random order; without the memory of a permutation."""
    rng = np.random.default_rng(seed)
    chosen = np.unique(rng.integers(0, len(ipas), count))
    rng.shuffle(chosen)
    return ipas[chosen]


def fault_floor(nest, ipas):
    """Serial and overlapped, on tables of the same size; the engine's own memory is let go first."""
    image, root, pages = nest.images[0], nest.roots[0], len(nest.canonical)
    order = nest.ipas
    nest.vm = nest.state = None
    lean = Lean(LeanWalk(image, root, 4), DATA, pages, pages)
    for at in range(0, pages, 1 << 22):
        lean.faults_batched(order[at : at + (1 << 22)], 16)
    return (min(lean.faults(ipas) for _ in range(3)), min(lean.faults_batched(ipas, 1) for _ in range(3)))


# --- instructions ------------------------------------------------------------------------------------------------


def instruction_curves():
    """Points from callgrind, at sizes that it can run."""
    from cases import CURVES
    from instructions import count

    curves = {}
    with tempfile.TemporaryDirectory(prefix="s2shadow-curves-") as folder:
        names = [name for points in CURVES.values() for name in points.values()]
        figures, _ = count(names, Path(folder))
    for curve, points in CURVES.items():
        curves[curve] = [{"x": x, "instructions": round(figures[name], 1)} for x, name in points.items()]
    return curves


# --- the command -------------------------------------------------------------------------------------------------

CURVES = {
    "notifier_by_contexts": (notifier_by_contexts, 256, 16),
    "notifier_by_pages": (notifier_by_pages, 1 << 22, 1 << 16),
    "notifier_by_aliases": (notifier_by_aliases, 1 << 10, 16),
    "fault_by_footprint": (fault_by_footprint, 8 << 30, 16 << 20),
}


def powers(first, last, factor):
    while first <= last:
        yield first
        first *= factor


def main(argv=None):
    parser = argparse.ArgumentParser(description="Cost against contexts, pages, aliases and footprint.")
    parser.add_argument("--only", nargs="+", choices=CURVES, default=list(CURVES), metavar="CURVE", help="of these")
    parser.add_argument("--small", action="store_true", help="small sizes")
    parser.add_argument("--instructions", action="store_true", help="count instructions instead of time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the points")
    options = parser.parse_args(argv)
    if options.instructions:
        from instructions import NOT_COUNTED, CannotCount

        try:
            curves = instruction_curves()
        except CannotCount as why:
            print(f"scaling: not counted: {why}", file=sys.stderr)
            return NOT_COUNTED
    else:
        curves = {name: curve(name, options.small) for name in options.only}
    for name, points in curves.items():
        show(name, points)
    if options.json:
        options.json.write_text(json.dumps(curves, indent=1) + "\n")
    return 0


def curve(name, small):
    make, most, few = CURVES[name]
    points = []
    for found in make(few if small else most):
        points.append(found)
        if sys.stderr.isatty():
            print(f"{name} {found['x']:,}: {found['ns']:,.0f} ns", file=sys.stderr)
    return points


def show(name, points):
    print(name)
    for found in points:
        print("  " + "  ".join(f"{key} {value:,}" for key, value in found.items()))


if __name__ == "__main__":
    sys.exit(main())
