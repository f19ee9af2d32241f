"""TLBIs of L1: every class with and without a TTL, ranges from 2 to 2^20 pages, dense and empty, exact and kvm72.

One context of 65,536 pages at IPAs from ``IPA_BASE``; what a run removed is faulted in again between runs. A run of the
single-address cases is 64 calls of ``vcpu.tlbi``, about 1 µs of each being the call itself.
"""

from itertools import cycle

import numpy as np
import pytest

import s2shadow as s2
from beds import PAGE, Bed, call_ns, scattered

PAGES = 1 << 16
EVENTS = 64
G = 1 << 30
TTL_PAGE = 0b0111 << 44  # 4K granule, level 3
TG_4K = 1 << 46
IPAS2E1IS = 0xD50C8020


class TlbiBed(Bed):
    """An engine of one context whose 65,536 leaves lie side by side, under either way to read a TLBI."""

    def __init__(self, tlbi="exact"):
        super().__init__(contexts=1, pages=PAGES, tlbi=tlbi)
        self.vcpu = self.vcpus[0]
        self.all = np.sort(self.ipas[0])
        self.first = int(self.all[0])
        assert int(self.all[-1]) == self.first + (PAGES - 1) * PAGE and self.first % G == 0
        self.empty = self.first + 4 * G  # within the 40 bits of the input size
        self.out = np.empty(PAGES, dtype=s2.FAULT_DTYPE)

    def touch(self, ipas):
        self.vcpu.fault_many(ipas, s2.READ, out=self.out[: len(ipas)])

    def refill(self):
        self.touch(self.all)
        assert self.vm.stats.live == PAGES


@pytest.fixture(scope="module")
def exact():
    return TlbiBed()


@pytest.fixture(scope="module")
def kvm72():
    return TlbiBed("kvm72")


@pytest.fixture
def full_exact(exact):
    exact.refill()
    return exact


@pytest.fixture
def full_kvm72(kvm72):
    kvm72.refill()
    return kvm72


def one_page(report, bed, op="IPAS2E1IS", hint=0, removed=1):
    """64 calls on pages that the last runs did not name."""
    batches = cycle(bed.all[scattered(PAGES)].reshape(-1, EVENTS))
    tlbi, named = bed.vcpu.tlbi, [bed.all[:0]]
    operands = []

    def prepare():
        bed.touch(named[0])
        named[0] = next(batches)
        operands[:] = [ipa >> 12 | hint for ipa in named[0].tolist()]

    def run():
        for operand in operands:
            tlbi(op, operand)

    before = bed.vm.stats.removed
    # shadow slot, head of the reverse map
    report.rounds(run, prepare, rounds=50, operations=EVENTS, footprints=(PAGES * 8, PAGES * 4))
    rounds, left = divmod(bed.vm.stats.removed - before, EVENTS)
    assert left == 0 and (rounds > 0) == bool(removed)


@pytest.mark.benchmark(group="TLBI by IPA, 64 leaves of 4K")
def bench_tlbi_ipa(report, full_exact):
    one_page(report, full_exact)


@pytest.mark.benchmark(group="TLBI by IPA, 64 leaves of 4K")
def bench_tlbi_ipa_kvm72(report, full_kvm72):
    one_page(report, full_kvm72)


@pytest.mark.benchmark(group="TLBI by IPA, 64 leaves of 4K")
def bench_tlbi_ipa_ttl(report, full_exact):
    one_page(report, full_exact, hint=TTL_PAGE)


@pytest.mark.benchmark(group="TLBI by IPA, 64 leaves of 4K")
def bench_tlbi_ipa_ttl_kvm72(report, full_kvm72):
    one_page(report, full_kvm72, hint=TTL_PAGE)


@pytest.mark.benchmark(group="TLBI by IPA, 64 leaves of 4K")
def bench_tlbi_ipa_wrong_ttl(report, full_exact):
    """A hint of level 2: no leaf of that level is there, none goes."""
    one_page(report, full_exact, hint=0b0110 << 44, removed=0)


@pytest.mark.benchmark(group="TLBI by IPA, 64 leaves of 4K")
def bench_tlbi_ipa_by_word(report, full_exact):
    """The operation as an instruction word."""
    one_page(report, full_exact, op=IPAS2E1IS)


# --- pages that have no shadow -----------------------------------------------------------------------------------


def nothing_there(report, bed, op, operand):
    """64 calls that remove nothing."""
    tlbi = bed.vcpu.tlbi

    def run():
        for _ in range(EVENTS):
            tlbi(op, operand)

    before = bed.vm.stats.removed
    report(run, operations=EVENTS, floor=call_ns)
    assert bed.vm.stats.removed == before


@pytest.mark.benchmark(group="TLBI by IPA, nothing there")
def bench_tlbi_ipa_not_shadowed(report, full_exact):
    nothing_there(report, full_exact, "IPAS2E1IS", full_exact.empty >> 12)


@pytest.mark.benchmark(group="TLBI by IPA, nothing there")
def bench_tlbi_ipa_ttl_not_shadowed(report, full_exact):
    nothing_there(report, full_exact, "IPAS2E1IS", full_exact.empty >> 12 | TTL_PAGE)


@pytest.mark.benchmark(group="TLBI by IPA, nothing there")
def bench_tlbi_ipa_not_shadowed_kvm72(report, full_kvm72):
    """Nothing within 1 GiB."""
    nothing_there(report, full_kvm72, "IPAS2E1IS", full_kvm72.empty >> 12)


@pytest.mark.benchmark(group="TLBI by IPA, one page of a full GiB not shadowed")
def bench_tlbi_ipa_hole(report, full_exact):
    """The page beside the last one: nothing is lost."""
    nothing_there(report, full_exact, "IPAS2E1IS", (full_exact.first >> 12) + PAGES)


@pytest.mark.benchmark(group="TLBI by IPA, one page of a full GiB not shadowed")
def bench_tlbi_ipa_hole_kvm72(report, full_kvm72):
    """The same: 65,536 leaves are lost. One call; compare with 64 of the others."""
    bed = full_kvm72
    operand = (bed.first >> 12) + PAGES
    report.rounds(lambda: bed.vcpu.tlbi("IPAS2E1IS", operand), bed.refill, rounds=10, floor=call_ns)
    assert bed.vm.stats.live == 0


# --- ranges ------------------------------------------------------------------------------------------------------


def range_operand(start, pages, level=0):
    """RIPAS2* operand of exactly ``pages`` 4K pages: a power of two from 2 to 2^21."""
    scale = 0
    while pages >> (5 * scale + 1) > 32:
        scale += 1
    num = (pages >> (5 * scale + 1)) - 1
    assert (num + 1) << (5 * scale + 1) == pages
    return TG_4K | scale << 44 | num << 39 | level << 37 | start >> 12


def dense(report, bed, pages, level=0):
    """One call on the first ``pages`` pages, all of them shadowed as far as the 65,536 go."""
    operand = range_operand(bed.first, pages, level)
    there = bed.all[:pages]

    def run():
        bed.vcpu.tlbi("RIPAS2E1IS", operand)

    leaves = len(there)
    rounds = 200 if leaves <= 1 << 10 else 20
    # shadow slot and link in order, heads at random
    report.rounds(run, lambda: bed.touch(there), rounds=rounds, operations=leaves, footprints=(leaves * 4,))
    assert bed.vm.stats.live == PAGES - leaves


@pytest.mark.benchmark(group="TLBI by range, dense, per leaf")
@pytest.mark.parametrize("pages", [2, 1 << 10, 1 << 16, 1 << 20])
def bench_tlbi_range_dense(report, full_exact, pages):
    dense(report, full_exact, pages)


@pytest.mark.benchmark(group="TLBI by range, dense, per leaf")
@pytest.mark.parametrize("pages", [2, 1 << 16])
def bench_tlbi_range_ttl_dense(report, full_exact, pages):
    dense(report, full_exact, pages, level=3)


@pytest.mark.benchmark(group="TLBI by range, dense, per leaf")
@pytest.mark.parametrize("pages", [2, 1 << 16])
def bench_tlbi_range_dense_kvm72(report, full_kvm72, pages):
    dense(report, full_kvm72, pages)


@pytest.mark.benchmark(group="TLBI by range, empty")
@pytest.mark.parametrize("pages", [2, 1 << 10, 1 << 20])
def bench_tlbi_range_empty(report, full_exact, pages):
    nothing_there(report, full_exact, "RIPAS2E1IS", range_operand(full_exact.empty, pages))


@pytest.mark.benchmark(group="TLBI by range, empty")
def bench_tlbi_range_empty_kvm72(report, full_kvm72):
    nothing_there(report, full_kvm72, "RIPAS2E1IS", range_operand(full_kvm72.empty, 1 << 20))


@pytest.mark.benchmark(group="TLBI by range, empty")
def bench_tlbi_range_128g_empty(report, full_exact):
    """The largest range there is, of 2^21 pages of 64K. A hint of another granule is no work at all."""
    operand = 3 << 46 | 3 << 44 | 31 << 39 | full_exact.empty >> 16
    nothing_there(report, full_exact, "RIPAS2E1IS", operand)


# --- whole contexts ----------------------------------------------------------------------------------------------


@pytest.mark.benchmark(group="TLBI of everything, per leaf")
@pytest.mark.parametrize("op", ["VMALLS12E1IS", "ALLE1IS"])
def bench_tlbi_all(report, full_exact, op):
    bed = full_exact
    report.rounds(lambda: bed.vcpu.tlbi(op), bed.refill, rounds=20, operations=PAGES, footprints=(PAGES * 4,))
    assert bed.vm.stats.live == 0


@pytest.mark.benchmark(group="TLBI of everything, per leaf")
def bench_tlbi_all_kvm72(report, full_kvm72):
    """Linux's steps over the empty address space are counted, not spent."""
    bed = full_kvm72
    run = bed.vcpu.tlbi
    report.rounds(lambda: run("VMALLS12E1IS"), bed.refill, rounds=20, operations=PAGES, footprints=(PAGES * 4,))


@pytest.mark.benchmark(group="TLBI of everything, empty context")
@pytest.mark.parametrize("op", ["VMALLS12E1IS", "ALLE1IS"])
def bench_tlbi_all_empty(report, exact, op):
    exact.vcpu.tlbi("ALLE1IS")
    nothing_there(report, exact, op, 0)


# --- stage 1, and batches ----------------------------------------------------------------------------------------


@pytest.mark.benchmark(group="TLBI of stage 1")
@pytest.mark.parametrize("op", ["VMALLE1IS", "VAE1IS", "RVAE1IS", "VAE2IS"])
def bench_tlbi_stage1(report, full_exact, op):
    """No leaf goes; nothing is owed, since maintenance is not tracked here."""
    nothing_there(report, full_exact, op, range_operand(0x12345000, 2) if op.startswith("R") else 0x12345)


@pytest.mark.benchmark(group="TLBIs in a batch, per operation")
@pytest.mark.parametrize("mode", ["exact", "kvm72"])
def bench_tlbi_many(report, mode, full_exact, full_kvm72):
    """4,096 single pages, each of which has its leaf."""
    bed = full_exact if mode == "exact" else full_kvm72
    named = bed.all[scattered(PAGES)][:4096]
    ops = np.zeros(len(named), dtype=s2.TLBI_OP_DTYPE)
    ops["insn"], ops["xt"] = IPAS2E1IS, named >> np.uint64(12)
    many = bed.vm.tlbi_many
    report.rounds(
        lambda: many(ops),
        lambda: bed.touch(named),
        rounds=20,
        operations=len(ops),
        footprints=(PAGES * 8, PAGES * 4),
    )


@pytest.mark.benchmark(group="TLBIs in a batch, per operation")
def bench_tlbi_many_empty(report, exact):
    exact.vcpu.tlbi("ALLE1IS")
    ops = np.zeros(4096, dtype=s2.TLBI_OP_DTYPE)
    ops["insn"], ops["xt"] = IPAS2E1IS, exact.all[:4096] >> np.uint64(12)
    report(lambda: exact.vm.tlbi_many(ops), operations=len(ops), footprints=(len(ops) * 8,))
