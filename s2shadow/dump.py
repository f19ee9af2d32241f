"""Stage-2 maps as ranges: what a table maps, the text of Linux's ``stage2_page_tables``, and what differs.

A map is an array of ``RANGE_DTYPE``, one row per run of entries that go on from each other, in the order of the IPA:

=========  ====  ===================================================================================================
start      u8    first IPA of the run, bytes
end        u8    first IPA behind it
pa         u8    output address of ``start``; ``NO_ADDRESS`` where nothing is mapped, or the source does not say
size       u8    bytes of one entry (block size); 0 where the source does not say
attrs      u8    the descriptor without its output address; of an invalid entry, and of kernel text, only the bits of
                 ``KERNEL_MASK``
level      i1    level of the entries, -1 to 3
state      u1    ``State``
perm       u1    ``READ``, ``WRITE``, ``EXEC``, ``EXEC_EL0`` bits of a mapped run, else 0
memattr    u1    MemAttr[3:0]; ``UNKNOWN`` where nothing is mapped, or the source does not say
sh         u1    SH[1:0], likewise
=========  ====  ===================================================================================================

``ranges`` reads tables and covers the whole IPA space. ``parse_kernel_text`` reads what Linux printed: no output
addresses, no block sizes, and never the last run, since nothing makes the kernel close it (Linux 7.2,
arch/arm64/kvm/ptdump.c and mm/ptdump.c). ``diff`` compares what both sides know.
"""

from s2shadow.kerneltext import (
    ends_inside_table,
    is_kernel_text,
    kernel_lines,
    kernel_name,
    kernel_text,
    parse_kernel_text,
)
from s2shadow.rangediff import DIFF_DTYPE, Difference, diff
from s2shadow.ranges import (
    KERNEL_MASK,
    NO_ADDRESS,
    RANGE_DTYPE,
    UNKNOWN,
    DumpError,
    State,
    from_records,
    ranges,
    records,
    shadow_ranges,
)

__all__ = [
    "DIFF_DTYPE",
    "KERNEL_MASK",
    "NO_ADDRESS",
    "RANGE_DTYPE",
    "UNKNOWN",
    "Difference",
    "DumpError",
    "State",
    "diff",
    "ends_inside_table",
    "from_records",
    "is_kernel_text",
    "kernel_lines",
    "kernel_name",
    "kernel_text",
    "parse_kernel_text",
    "ranges",
    "records",
    "shadow_ranges",
]
