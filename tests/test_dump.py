"""Stage-2 maps as ranges: against a formatter that visits every entry, single walks, captures; what diff finds."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import s2shadow as s2
import snapshots
from rig import DATA, PAGE, RAM, Rig
from s2shadow import dump
from s2shadow.dump import Difference, DumpError, State
from test_walk_model import SEEDED, Twins, tablegen

K, M, G = 1 << 10, 1 << 20, 1 << 30
ROOT = 0x4000_0000
PAGE_ENTRIES = 512


# --- the slow way: straight from the description of the format, entry by entry -----------------------------------


def entries(words, table, level, ipa, count):
    """(IPA, level, descriptor) of every entry that is not a table, in address order; 4K granule."""
    for index in range(count):
        desc, at = words(table + 8 * index), ipa + index * snapshots.SIZE[level]
        if level < 3 and desc & 3 == 3:
            yield from entries(words, desc & 0x0000_FFFF_FFFF_F000, level + 1, at, PAGE_ENTRIES)
        else:
            yield at, level, desc


def slow_runs(found):
    """[start, end, level, masked descriptor] of consecutive entries that the kernel's line does not tell apart."""
    mask = 1 << 0 | 1 << 1 | 1 << 6 | 1 << 7 | 1 << 10 | 1 << 53 | 1 << 54
    runs = []
    for ipa, level, desc in found:
        if not runs or runs[-1][2:] != [level, desc & mask]:
            runs.append([ipa, None, level, desc & mask])
        runs[-1][1] = ipa + snapshots.SIZE[level]
    return runs


def slow_line(start, end, level, bits):
    size, unit = (end - start) // 1024, 0
    while size % 1024 == 0 and "KMGTPE"[unit] != "E":
        size, unit = size // 1024, unit + 1
    text = f"0x{start:016x}-0x{end:016x}   {size:9}{'KMGTPE'[unit]} {level}"
    if bits:
        text += " " + (" " if bits & 1 else "F")
        text += " " + ("R" if bits >> 6 & 1 else " ")
        text += " " + ("W" if bits >> 7 & 1 else " ")
        text += " " + {0: "px ux ", 1: "PXNux ", 2: "PXNUXN", 3: "px UXN"}[bits >> 53 & 3]
        text += " " + ("AF" if bits >> 10 & 1 else "  ")
        text += " " + ("BLK" if bits & 3 == 1 else "   ")
    return text + "\n"


def slow_text(words, table, level, count):
    runs = slow_runs(entries(words, table, level, 0, count))
    return "---[ Guest IPA ]---\n" + "".join(slow_line(*run) for run in runs[:-1])


# --- tables ------------------------------------------------------------------------------------------------------


class Image:
    """4K-granule tables in memory: IPA bits ``ia`` from level ``start``, the start tables at ROOT."""

    def __init__(self, ia=32, start=1, vtcr=0, **features):
        self.start, self.count = start, 1 << ia - (39 - 9 * start)
        self.vtcr = 64 - ia | {2: 0, 1: 1, 0: 2}[start] << 6 | 5 << 16 | 1 << 31 | vtcr
        self.cfg = s2.Stage2Config(ROOT, self.vtcr, s2.Features(**features))
        assert self.cfg.error is None and self.cfg.start_level == start
        self.mem = s2.GuestMemory()
        self.mem.add(ROOT, 16 * M)
        self.next = ROOT + 64 * K

    def table(self):
        self.next += PAGE
        return self.next - PAGE

    def set(self, table, index, *descs):
        for i, desc in enumerate(descs):
            self.mem.write64(table + 8 * (index + i), desc)

    def text(self):
        return slow_text(self.mem.read64, ROOT, self.start, self.count)

    def rows(self):
        return dump.ranges(self.mem, self.cfg)


R, W, RW, AF, BLOCK, LEAF = 1 << 6, 2 << 6, 3 << 6, 1 << 10, 1, 3


def xn(bits):
    return bits << 53


def worked_example():
    """Three levels by hand, 4 GiB of IPA: each attribute word once, runs that merge, empty tables, an odd invalid."""
    image = Image()
    second, third, empty = image.table(), image.table(), image.table()
    image.set(ROOT, 0, second | 3, 0x8000_0000 | RW | AF | BLOCK, AF | R)
    image.set(second, 0, third | 3, 0x9000_0000 | R | xn(2) | AF | BLOCK, 0xA000_0000 | RW | AF | BLOCK,
              0xB000_0000 | RW | AF | BLOCK | 0xF << 2 | 3 << 8, empty | 3)
    image.set(third, 0, 0x1000 | RW | AF | LEAF, 0x9000 | RW | AF | LEAF, 0x3000 | RW | LEAF, 0x4000 | W | xn(3) | LEAF,
              0x5000 | xn(1) | LEAF)
    return image


GOLDEN = """\
---[ Guest IPA ]---
0x0000000000000000-0x0000000000002000           8K 3   R W px ux  AF    \n\
0x0000000000002000-0x0000000000003000           4K 3   R W px ux        \n\
0x0000000000003000-0x0000000000004000           4K 3     W px UXN       \n\
0x0000000000004000-0x0000000000005000           4K 3       PXNux        \n\
0x0000000000005000-0x0000000000200000        2028K 3
0x0000000000200000-0x0000000000400000           2M 2   R   PXNUXN AF BLK
0x0000000000400000-0x0000000000800000           4M 2   R W px ux  AF BLK
0x0000000000800000-0x0000000000a00000           2M 3
0x0000000000a00000-0x0000000040000000        1014M 2
0x0000000040000000-0x0000000080000000           1G 1   R W px ux  AF BLK
0x0000000080000000-0x00000000c0000000           1G 1 F R   px ux  AF    \n\
"""


def test_worked_example():
    image = worked_example()
    assert dump.kernel_text(image.rows()) == GOLDEN
    assert image.text() == GOLDEN, "the slow formatter itself"


def test_worked_example_as_ranges():
    rows = worked_example().rows()
    assert rows.dtype == dump.RANGE_DTYPE
    names = ["start", "end", "level", "state", "pa", "size"]
    invalid, mapped, none = State.INVALID, State.MAPPED, dump.NO_ADDRESS
    assert rows[names].tolist() == [
        (0, 0x1000, 3, mapped, 0x1000, 4 * K),              # output addresses do not go on: two ranges
        (0x1000, 0x2000, 3, mapped, 0x9000, 4 * K),
        (0x2000, 0x3000, 3, mapped, 0x3000, 4 * K),
        (0x3000, 0x4000, 3, mapped, 0x4000, 4 * K),
        (0x4000, 0x5000, 3, mapped, 0x5000, 4 * K),
        (0x5000, 2 * M, 3, invalid, none, 4 * K),
        (2 * M, 4 * M, 2, mapped, 0x9000_0000, 2 * M),
        (4 * M, 6 * M, 2, mapped, 0xA000_0000, 2 * M),
        (6 * M, 8 * M, 2, mapped, 0xB000_0000, 2 * M),      # memory attributes differ too
        (8 * M, 10 * M, 3, invalid, none, 4 * K),           # an empty table shows by its level
        (10 * M, G, 2, invalid, none, 2 * M),
        (G, 2 * G, 1, mapped, 0x8000_0000, G),
        (2 * G, 3 * G, 1, invalid, none, G),
        (3 * G, 4 * G, 1, invalid, none, G),                # the kernel never prints this one
    ]
    assert rows["perm"].tolist() == [39, 39, 39, 6, 32, 0, 1, 39, 39, 0, 0, 39, 0, 0]
    assert rows["memattr"][8] == 0xF and rows["sh"][8] == 3 and rows["memattr"][9] == dump.UNKNOWN
    assert rows["attrs"][12] == AF | R and rows["attrs"][3] == W | xn(3) | LEAF


@pytest.mark.parametrize("size, text", [
    (4 * K, "        4K"), (12 * K, "       12K"), (M, "        1M"), (1536 * K, "     1536K"), (G, "        1G"),
    (512 * G, "      512G"), (1 << 40, "        1T"), (255 << 39, "   130560G"), (1 << 50, "        1P"),
    (1 << 52, "        4P"), ((1 << 52) - 4 * K, "4398046511100K"),
])
def test_sizes(size, text):
    from s2shadow.kerneltext import kernel_size

    assert kernel_size(size) == text


def test_one_run_is_only_the_marker():
    assert dump.kernel_text(Image().rows()) == "---[ Guest IPA ]---\n"
    assert len(dump.parse_kernel_text("---[ Guest IPA ]---\n")) == 0


@pytest.mark.parametrize("ia, start", [(25, 2), (33, 1), (40, 1), (48, 0)])
def test_wide_spaces_are_computed(ia, start):
    """One page at the very end of the IPA space: a handful of rows, and the kernel prints all but that page's."""
    image = Image(ia, start)
    table, last = ROOT, image.count - 1
    for _ in range(start, 3):
        below = image.table()
        image.set(table, last, below | 3)
        table, last = below, PAGE_ENTRIES - 1
    image.set(table, last, 0x1000 | RW | AF | LEAF)
    rows = image.rows()
    assert len(rows) == 5 - start
    assert (rows["start"][-1], rows["end"][-1]) == ((1 << ia) - PAGE, 1 << ia)
    assert dump.kernel_text(rows).count("\n") == 5 - start      # the marker is in, the page is not


def test_52_bit_space():
    """LPA2: 16 start tables of level 0; output addresses have their bits 51:50 in the shareability field."""
    image = Image(52, 0, vtcr=1 << 32 | (6 ^ 5) << 16 | 3 << 12, pa_bits=52, lpa2=True, lpa=True)
    assert image.cfg.concatenated == 16
    image.set(ROOT, 8191, 3 << 8 | 1 << 48 | RW | AF | BLOCK)        # a 512 GiB block
    rows = image.rows()
    assert rows["pa"].tolist() == [dump.NO_ADDRESS, 0xD << 48] and rows["sh"][1] == 3
    assert dump.kernel_text(rows).splitlines()[1:] == [
        f"0x0000000000000000-0x000fff8000000000   {8191 * 512:9}G 0"]


# --- random tables -----------------------------------------------------------------------------------------------

ATTRS = st.builds(lambda ap, xnx, af, rest: ap << 6 | xnx << 53 | af << 10 | rest, st.integers(0, 3), st.integers(0, 3),
                  st.integers(0, 1), st.sampled_from([0, 0, 0xF << 2 | 3 << 8, 1 << 52, 1 << 51, 5 << 55]))
OUTPUT = st.sampled_from([0x8000_0000, 0x8020_0000, 0x8000_1000, 0x8000_2000, 0xC000_0000])


@st.composite
def descriptors(draw, level, tables):
    """A table, a leaf, an encoding that the level lacks, or an invalid entry that software left its marks in."""
    kind = draw(st.sampled_from(["table"] * 4 * bool(tables) + ["leaf"] * 5 + ["zero"] * 2 + ["odd", "junk"]))
    if kind == "table":
        return draw(st.sampled_from(tables)) | 3
    if kind == "leaf":
        return draw(OUTPUT) & -snapshots.SIZE[level] | draw(ATTRS) | (LEAF if level == 3 else BLOCK)
    if kind == "odd" and level == 3:
        return draw(OUTPUT) | draw(ATTRS) | 1
    return 0 if kind == "zero" else draw(ATTRS) | draw(st.sampled_from([0, 2]))


@st.composite
def images(draw, ia=32, start=1, third_level=3):
    """Three levels (or two) with a few entries here and there, in runs, tables shared between entries."""
    image = Image(ia, start)
    pools = {level: [image.table() for _ in range(third_level if level == 3 else 2)] for level in range(start + 1, 4)}
    for level in range(start, 4):
        for table in pools.get(level, [ROOT]):
            width = image.count if level == start else PAGE_ENTRIES
            if draw(st.booleans()) and level > start:
                image.set(table, 0, *[draw(descriptors(level, pools.get(level + 1, [])))] * width)
            for _ in range(draw(st.integers(0, 4))):
                index = draw(st.integers(0, width - 1))
                desc = draw(descriptors(level, pools.get(level + 1, [])))
                image.set(table, index, *[desc] * min(draw(st.integers(1, 3)), width - index))
    return image


@given(images())
@settings(max_examples=60)
def test_text_is_the_slow_formatters(image):
    """Line by line what visiting every entry gives, and back."""
    text = dump.kernel_text(image.rows())
    assert text == image.text()
    back = dump.parse_kernel_text(text)
    assert dump.kernel_text(back) == text
    assert len(dump.diff(image.rows(), back)) == len(dump.diff(back, image.rows())) == 0
    assert len(dump.diff(image.rows(), back, access_flag=True)) == 0


def unrolled(rows):
    """Leaves of the mapped ranges, as ``leaves`` gives them."""
    found = []
    for row in rows[rows["state"] == State.MAPPED]:
        start, end, size = (int(row[name]) for name in ("start", "end", "size"))
        found += [(at, int(row["pa"]) + at - start, size, int(row["level"]), int(row["perm"]), int(row["memattr"]),
                   int(row["sh"])) for at in range(start, end, size)]
    return found


LEAF_NAMES = ["ipa", "pa", "size", "level", "perm", "memattr", "sh"]


def tiles(rows, bits):
    """The ranges cover the IPA space without gap, and no two neighbours are one."""
    assert rows["start"][0] == 0 and int(rows["end"][-1]) == 1 << bits
    assert (rows["start"][1:] == rows["end"][:-1]).all() and (rows["start"] < rows["end"]).all()
    same = (rows["level"][1:] == rows["level"][:-1]) & (rows["attrs"][1:] == rows["attrs"][:-1])
    same &= rows["state"][1:] == rows["state"][:-1]
    return not (same & ((rows["state"][1:] != State.MAPPED) | (np.diff(rows["pa"]) == np.diff(rows["start"])))).any()


@given(images())
@settings(max_examples=60)
def test_ranges_are_the_leaves(image):
    """Every leaf is in one range, and the ranges hold nothing else."""
    rows = image.rows()
    assert tiles(rows, image.cfg.ia_bits)
    assert unrolled(rows) == [tuple(row) for row in s2.leaves(image.mem, image.cfg)[LEAF_NAMES].tolist()]


@given(SEEDED)
@settings(max_examples=300)
def test_every_geometry(rng):
    """Any granule, size, start level, LPA and LPA2, either byte order, junk: what the range says, a walk meets."""
    twins = Twins(rng)
    cfg, mem = twins.theirs, twins.ours
    if not cfg.enabled or cfg.error is not None:
        with pytest.raises(ValueError, match="stage 2 is off" if not cfg.enabled else cfg.error):
            dump.ranges(mem, cfg)
        return
    for _ in range(6):
        tablegen.grow(rng, twins.mem, twins.cfg, tablegen.random_address(rng, cfg.ia_bits))
    twins.copy_tables()
    rows = dump.ranges(mem, cfg)
    assert tiles(rows, cfg.ia_bits)
    twins.check_tables()
    leaves = s2.leaves(mem, cfg)
    mapped = rows[rows["state"] == State.MAPPED]
    assert int(((mapped["end"] - mapped["start"]) // mapped["size"]).sum()) == len(leaves)
    some = [rows[rng.randrange(len(rows))] for _ in range(20)]
    for row in some:
        start, end = int(row["start"]), int(row["end"])
        for ipa in {start, end - 1, rng.randrange(start, end)}:
            check_walk(s2.walk(mem, cfg, ipa, update=False), row, ipa)


def check_walk(walk, row, ipa):
    level = int(row["level"])
    text = {State.INVALID: "translation fault", State.RESERVED: "translation fault",
            State.ADDRESS_SIZE: "address size fault", State.NO_TABLE: "external abort on table walk"}.get(row["state"])
    if text is not None:
        assert walk.fault == f"{text}, level {level}"
    elif walk.fault is None or walk.fault.startswith("permission fault"):
        assert (walk.pa, walk.size, walk.level) == (int(row["pa"]) + ipa - int(row["start"]), row["size"], level)
        assert (walk.perm, walk.memattr, walk.sh) == (row["perm"], row["memattr"], row["sh"])
    else:
        assert walk.fault.startswith("access flag fault") and not int(row["attrs"]) & AF


def test_loops_and_limits():
    """Tables that point at themselves end in an error, not in a machine without memory."""
    image = Image(39, 1)
    image.set(ROOT, 0, *[ROOT | 3] * 512)
    with pytest.raises(ValueError, match="more than 1000 leaves"):
        dump.ranges(image.mem, image.cfg, limit=1000)
    image = Image(48, 0)
    first, second, third = image.table(), image.table(), image.table()
    for table, below in ((ROOT, first), (first, second), (second, third)):
        image.set(table, 0, *[below | 3] * 512)
    with pytest.raises(ValueError, match="or tables that loop"):
        dump.ranges(image.mem, image.cfg, limit=10_000)


def test_no_table_has_no_kernel_text():
    image = Image()
    image.set(ROOT, 1, 0x1_0000_0000 | 3)
    rows = image.rows()
    assert rows["state"].tolist() == [State.INVALID, State.NO_TABLE, State.INVALID]
    assert rows["level"].tolist() == [1, 2, 1]
    with pytest.raises(DumpError, match="the table for 0x40000000 cannot be read"):
        dump.kernel_text(rows)


def test_a_table_that_is_in_memory_in_part():
    """A 64K table over 4K of RAM: its other entries cannot be read, what is there counts."""
    mem = s2.GuestMemory()
    mem.add(ROOT + 15 * PAGE, PAGE)
    cfg = s2.Stage2Config(ROOT, 64 - 29 | 1 << 14 | 5 << 16 | 1 << 31)      # 64K granule, one table of level 3
    assert (cfg.granule, cfg.start_level, cfg.error) == (65536, 3, None)
    mem.write64(ROOT + 8 * 8191, 0x1_0000 | RW | AF | LEAF)
    rows = dump.ranges(mem, cfg)
    assert rows["state"].tolist() == [State.NO_TABLE, State.INVALID, State.MAPPED]
    assert rows["start"].tolist() == [0, 7680 << 16, 8191 << 16]
    assert s2.leaves(mem, cfg)["ipa"].tolist() == [8191 << 16]
    for ipa, fault in ((0, "external abort on table walk, level 3"), (7680 << 16, "translation fault, level 3")):
        assert s2.walk(mem, cfg, ipa).fault == fault


def test_blocks_that_must_not_be_cached():
    """nT with FEAT_BBM: a walk for the shadow refuses such a block, so neither leaves nor ranges have it mapped."""
    image = Image(bbm=True)
    image.set(ROOT, 1, 0x4000_0000 | 1 << 16 | RW | AF | BLOCK)
    assert s2.walk(image.mem, image.cfg, G).fault == "translation fault, level 1"
    assert len(s2.leaves(image.mem, image.cfg)) == 0
    assert image.rows()["state"].tolist() == [State.INVALID, State.RESERVED, State.INVALID]


def test_nothing_is_written():
    image = worked_example()
    before = image.mem.read(ROOT, 16 * M)
    dump.kernel_text(image.rows())
    assert image.mem.read(ROOT, 16 * M) == before


# --- reading kernel text -----------------------------------------------------------------------------------------


def test_parse_the_worked_example():
    rows = dump.parse_kernel_text(GOLDEN)
    assert dump.is_kernel_text(rows) and not dump.is_kernel_text(worked_example().rows())
    assert dump.kernel_text(rows) == GOLDEN
    assert rows["level"].tolist() == [3, 3, 3, 3, 3, 2, 2, 3, 2, 1, 1]
    assert rows["perm"].tolist() == [39, 39, 6, 32, 0, 1, 39, 0, 0, 39, 0]
    assert set(rows["size"]) == {0} and set(rows["pa"]) == {dump.NO_ADDRESS} and set(rows["memattr"]) == {dump.UNKNOWN}
    assert rows["attrs"][10] == AF | R


@pytest.mark.parametrize("source", ["file", "lines", "bare", "stripped", "crlf"])
def test_parse_sources(source, tmp_path):
    """From a file line by line, from any iterable; without the blanks that an editor drops; with CR LF."""
    lines = GOLDEN.splitlines(keepends=True)
    if source == "file":
        (tmp_path / "dump").write_text(GOLDEN)
        with open(tmp_path / "dump") as file:
            found = dump.parse_kernel_text(file)
    elif source == "lines":
        found = dump.parse_kernel_text(iter(lines))
    elif source == "bare":
        found = dump.parse_kernel_text(line.rstrip("\n") for line in lines)
    else:
        end = "\n" if source == "stripped" else "\r\n"
        found = dump.parse_kernel_text("".join(line.rstrip() + end for line in lines))
    assert (found == dump.parse_kernel_text(GOLDEN)).all()


MARKER, FIRST, *_ = GOLDEN.splitlines()


@pytest.mark.parametrize("text, message", [
    ("", "is empty"),
    ("\n", "line 1: must be '---[ Guest IPA ]---', got ''"),
    ("hello\n", "line 1: must be '---[ Guest IPA ]---', got 'hello'"),
    (MARKER, "line 1 is cut short"),
    (MARKER + "\n" + FIRST[:40], "line 2 is cut short: '" + FIRST[:40]),
    (MARKER + "\n" + FIRST, "line 2 is cut short"),
    (MARKER + "\n" + FIRST[:40] + "\n", "line 2: not a range as Linux 7.2 prints it: '" + FIRST[:40]),
    (MARKER + "\n\n", "line 2: not a range as Linux 7.2 prints it: ''"),
    (MARKER + "\n" + MARKER + "\n", "line 2: not a range"),
    (MARKER + "\n" + FIRST.replace("0x", "0X") + "\n", "line 2: not a range"),
    (MARKER + "\n" + FIRST.replace("8K", "9K") + "\n", "line 2: the range is 8K, but the line says 9K"),
    (MARKER + "\n" + FIRST.replace("  8K", "8K") + "\n", "line 2: the range is 8K, but the line says 8K"),
    (MARKER + "\n" + FIRST.replace("K 3", "K 4") + "\n", "line 2: not a range"),
    (MARKER + "\n" + FIRST.replace("K 3", "K 2") + "\n", "line 2: valid at level 2, but no block"),
    (MARKER + "\n" + FIRST.replace(" R ", " X ") + "\n", "line 2: not attributes as Linux 7.2 prints them"),
    (MARKER + "\n" + FIRST.replace("px ux ", "PXNUX ") + "\n", "line 2: not attributes"),
    (MARKER + "\n" + FIRST.replace("3   R", "3 F R").replace("AF    ", "AF BLK") + "\n", "line 2: not attributes"),
    (MARKER + "\n" + FIRST + " more\n", "line 2: not attributes"),
    (MARKER + "\n0x0000000000000000-0x0000000000001000           4K 3   R W X AF    \n", "line 2: not attributes"),
    (MARKER + "\n" + FIRST + "\n" + FIRST + "\n", "line 3: starts at 0x0, but the line before ends at 0x2000"),
    (MARKER + "\n0x0000000000001000-0x0000000000002000           4K 3\n",
     "line 2: starts at 0x1000, but the first range starts at 0"),
    (MARKER + "\n0x0000000000000000-0x0000000000000800           0K 3\n", "line 2: no range of pages: 0x0 to 0x800"),
    (MARKER + "\n0x0000000000000000-0x0000000000000000           0K 3\n", "line 2: no range of pages: 0x0 to 0x0"),
    (MARKER + "\n" + FIRST + "\n" + FIRST.replace("2000", "4000").replace("0x0000000000000000", "0x0000000000002000")
     + "\n", "line 3: level and attributes of the line before"),
])
def test_parse_errors(text, message):
    with pytest.raises(DumpError) as info:
        dump.parse_kernel_text(text, "their.txt")
    assert str(info.value).startswith("their.txt") and message in str(info.value)


def test_invalid_runs_that_print_alike():
    """Bit 1 of an invalid entry tells runs apart and has no column; the text survives reading and writing."""
    image = Image()
    image.set(ROOT, 0, R, R | 2, R, 2)
    text = dump.kernel_text(image.rows())
    assert text == image.text() and text.count(" 1 F R   px ux") == 3
    assert dump.kernel_text(dump.parse_kernel_text(text)) == text


@given(images(), st.data())
@settings(max_examples=80)
def test_flipped_bits_and_cuts(image, data):
    """A damaged text is refused with its line, or is one that Linux could have printed; nothing else happens."""
    text = dump.kernel_text(image.rows()).encode()
    if data.draw(st.booleans()):
        text = text[:data.draw(st.integers(0, len(text)))]
    else:
        at, bit = data.draw(st.integers(0, len(text) - 1)), data.draw(st.integers(0, 7))
        text = text[:at] + bytes([text[at] ^ 1 << bit]) + text[at + 1:]
    text = text.decode("latin-1")
    try:
        rows = dump.parse_kernel_text(text, "x")
    except DumpError as error:
        assert str(error).startswith("x: line ") or str(error) == "x is empty"
    else:
        assert dump.kernel_text(rows).split() == text.split()


def test_flips_in_numbers_do_not_pass():
    """Start, end and size say the same thing twice, and each range starts where the last ended."""
    for number, line in enumerate(GOLDEN.splitlines(keepends=True)[1:-1], 1):
        for at in range(len("0x0000000000000000-0x0000000000000000   ") + 10):
            for bit in range(8):
                lines = GOLDEN.splitlines(keepends=True)
                lines[number] = line[:at] + chr(ord(line[at]) ^ 1 << bit) + line[at + 1:]
                with pytest.raises(DumpError):
                    dump.parse_kernel_text("".join(lines))


def test_text_that_may_have_been_cut():
    """Between two lines a cut cannot be told from the end, but inside a table it looks odd."""
    lines = GOLDEN.splitlines(keepends=True)
    assert not dump.ends_inside_table(dump.parse_kernel_text(GOLDEN))
    assert dump.ends_inside_table(dump.parse_kernel_text("".join(lines[:4])))
    assert not dump.ends_inside_table(worked_example().rows())


def test_names_of_the_kernels_files():
    assert dump.kernel_name(0x1000044196001, 0x802D355C) == "0x0001000044196000-0x00000000802d355c-s2-enabled"
    assert dump.kernel_name(2, 0, enabled=False) == "0x0000000000000002-0x0000000000000000-s2-disabled"


# --- records -----------------------------------------------------------------------------------------------------


@given(images())
@settings(max_examples=30)
def test_records_round_trip(image):
    """Through JSON and back, every field; kernel text too."""
    for rows in (image.rows(), dump.parse_kernel_text(dump.kernel_text(image.rows()))):
        again = dump.from_records(json.loads(json.dumps(dump.records(rows))))
        assert again.dtype == rows.dtype and again.tolist() == rows.tolist()


GOOD = dump.records(worked_example().rows())


@pytest.mark.parametrize("change, message", [
    ({"start": None}, "ranges[1]: start must be a hexadecimal number in text, got None"),
    ({"start": 4096}, "ranges[1]: start must be a hexadecimal number in text, got 4096"),
    ({"start": "0x2000"}, "ranges[1]: no range of pages: 0x2000 to 0x2000"),
    ({"end": "0x01800"}, "ranges[1]: end must be"),
    ({"end": "0x10000000000000000"}, "ranges[1]: end must be"),
    ({"end": "0x3000"}, "ranges[2] starts at 0x2000, but the range before it ends at 0x3000"),
    ({"level": 4}, "ranges[1]: level must be a number from -1 to 3, got 4"),
    ({"level": True}, "ranges[1]: level must be a number from -1 to 3, got True"),
    ({"state": "open"}, "ranges[1]: state must be one of invalid, mapped"),
    ({"perm": "rwz"}, "ranges[1]: perm must be one of"),
    ({"af": 0}, "ranges[1]: af is not what attrs says"),
    ({"size": 3000}, "ranges[1]: size 3000 is no entry size of the range"),
    ({"size": None}, "ranges[1]: size is missing"),
    ({"memattr": 16}, "ranges[1]: memattr must be a number from 0 to 15, got 16"),
    ({"pa": "9000"}, "ranges[1]: pa must be a hexadecimal number in text, got '9000'"),
])
def test_record_errors(change, message):
    records = [dict(record) for record in GOOD]
    records[1] |= change
    with pytest.raises(DumpError) as info:
        dump.from_records(records, "x")
    assert message in str(info.value)


def test_record_errors_of_shape():
    for records, message in (({}, "ranges must be a list, got dict"), ([7], r"ranges\[0\]: must be an object, got int"),
                             ([{}], r"ranges\[0\]: start is missing")):
        with pytest.raises(DumpError, match=message):
            dump.from_records(records, "x")


# --- diff --------------------------------------------------------------------------------------------------------

SMALL = {"ia": 26, "start": 2, "third_level": 2}      # 16K pages: the slow comparison looks at each


def pages_of(rows):
    """{page: what is mapped there} of the mapped ranges."""
    found = {}
    for row in rows[rows["state"] == State.MAPPED]:
        start, end, pa, size, attrs, level, _, perm, memattr, sh = row.tolist()
        for at in range(start, end, PAGE):
            found[at] = {"size": size, "perm": perm, "pa": pa + at - start, "mem": (memattr, sh), "af": attrs >> 10 & 1}
    return found


def slow_diff(a, b, access_flag):
    """{page: kinds}, page by page."""
    a, b, found = pages_of(a), pages_of(b), {}
    for page in a.keys() | b.keys():
        if page not in b:
            found[page] = Difference.MISSING
        elif page not in a:
            found[page] = Difference.EXTRA
        else:
            names = {"size": Difference.SIZE, "perm": Difference.PERMISSION, "pa": Difference.ADDRESS,
                     "mem": Difference.ATTRIBUTES, **({"af": Difference.ACCESS_FLAG} if access_flag else {})}
            kind = sum(bit for name, bit in names.items() if a[page][name] != b[page][name])
            if kind:
                found[page] = kind
    return found


def by_page(rows):
    return {at: int(row["kind"]) for row in rows for at in range(int(row["start"]), int(row["end"]), PAGE)}


@given(images(**SMALL), images(**SMALL), st.booleans())
@settings(max_examples=60)
def test_diff_is_the_slow_one(first, second, access_flag):
    """Page by page the same kinds; the other way round missing is extra, and the rest stays; with itself nothing."""
    a, b = first.rows(), second.rows()
    found = dump.diff(a, b, access_flag)
    assert found.dtype == dump.DIFF_DTYPE
    assert by_page(found) == slow_diff(a, b, access_flag)
    assert (found["start"][1:] >= found["end"][:-1]).all()
    back = dump.diff(b, a, access_flag)
    turned = {Difference.MISSING: Difference.EXTRA, Difference.EXTRA: Difference.MISSING}
    assert back["kind"].tolist() == [turned.get(kind, kind) for kind in found["kind"].tolist()]
    for name in ("start", "end"):
        assert back[name].tolist() == found[name].tolist()
    for name in ("pa", "size", "level", "perm", "young", "memattr", "sh"):
        assert back[f"a_{name}"].tolist() == found[f"b_{name}"].tolist()
    assert len(dump.diff(a, a, access_flag)) == 0


def cut(rows, rng):
    """The same map in smaller pieces."""
    pieces = []
    for row in rows:
        start, end = int(row["start"]), int(row["end"])
        at = sorted({start, *(rng.randrange(start, end) // PAGE * PAGE for _ in range(3))} - {0} | {start})
        for lo, hi in zip(at, [*at[1:], end], strict=True):
            piece = row.copy()
            piece["start"], piece["end"] = lo, hi
            if row["state"] == State.MAPPED:
                piece["pa"] += np.uint64(lo - start)
            pieces.append(piece)
    return np.array(pieces, dtype=dump.RANGE_DTYPE)


@given(images(**SMALL), images(**SMALL), SEEDED)
@settings(max_examples=40)
def test_diff_does_not_see_where_ranges_are_cut(first, second, rng):
    a, b = first.rows(), second.rows()
    assert dump.diff(cut(a, rng), cut(b, rng)).tolist() == dump.diff(a, b).tolist()
    assert len(dump.diff(a, cut(a, rng))) == 0


@given(images(**SMALL), images(**SMALL))
@settings(max_examples=40)
def test_diff_with_kernel_text(first, second):
    """Against text: the same ranges as between the maps, but for what text does not say, up to where it ends."""
    a, b = first.rows(), second.rows()
    text = dump.parse_kernel_text(dump.kernel_text(b))
    end = int(text["end"][-1]) if len(text) else 0
    unsaid = Difference.ADDRESS | Difference.ATTRIBUTES
    want = {page: kind & ~unsaid for page, kind in by_page(dump.diff(a, b)).items() if kind & ~unsaid and page < end}
    assert {page: kind for page, kind in by_page(dump.diff(a, text)).items() if page < end} == want


def edited(position, desc):
    image = worked_example()
    table, index = position
    image.set(table, index, desc)
    return image.rows()


SECOND, THIRD = ROOT + 64 * K, ROOT + 68 * K


@pytest.mark.parametrize("position, desc, want", [
    ((THIRD, 1), 0, (0x1000, 0x2000, Difference.MISSING)),
    ((THIRD, 9), 0x7000 | LEAF, (0x9000, 0xA000, Difference.EXTRA)),
    ((THIRD, 1), 0x9000 | R | AF | LEAF, (0x1000, 0x2000, Difference.PERMISSION)),
    ((THIRD, 1), 0x9000 | RW | xn(2) | AF | LEAF, (0x1000, 0x2000, Difference.PERMISSION)),
    ((THIRD, 1), 0xB000 | RW | AF | LEAF, (0x1000, 0x2000, Difference.ADDRESS)),
    ((THIRD, 1), 0x9000 | RW | AF | LEAF | 0xF << 2, (0x1000, 0x2000, Difference.ATTRIBUTES)),
    ((THIRD, 1), 0xB000 | R | AF | LEAF, (0x1000, 0x2000, Difference.PERMISSION | Difference.ADDRESS)),
    ((THIRD, 1), 0x9000 | RW | LEAF, None),
    ((THIRD, 1), 0x9000 | RW | AF | LEAF | 5 << 55, None),
    ((SECOND, 4), 0, None),                                    # an empty table or none: nothing is mapped
    ((ROOT, 2), 0, None),
], ids=str)
def test_one_edit(position, desc, want):
    a, b = worked_example().rows(), edited(position, desc)
    found = dump.diff(a, b)
    if want is None:
        assert len(found) == 0
        return
    assert [(row["start"], row["end"], row["kind"]) for row in found] == [want]
    if want[2] & Difference.ADDRESS:
        assert (found["a_pa"][0], found["b_pa"][0]) == (0x9000, desc & 0xF000)
    else:
        assert found["a_pa"][0] == dump.NO_ADDRESS


def test_a_block_in_pages():
    """Split, with the same output addresses and permissions: only the size differs, in one range; in text the level."""
    image = worked_example()
    split = image.table()
    image.set(SECOND, 1, split | 3)
    image.set(split, 0, *[0x9000_0000 + PAGE * i | R | xn(2) | AF | LEAF for i in range(512)])
    image.set(split, 7, 0)
    a, b = worked_example().rows(), image.rows()
    for left, right, sizes in ((a, b, (2 * M, PAGE)), (dump.parse_kernel_text(GOLDEN), b, (0, 0))):
        found = dump.diff(left, right)
        assert [(int(row["start"]) - 2 * M, int(row["end"]) - 2 * M, row["kind"]) for row in found] == [
            (0, 7 * PAGE, Difference.SIZE), (7 * PAGE, 8 * PAGE, Difference.MISSING),
            (8 * PAGE, 2 * M, Difference.SIZE)]
        assert (found["a_size"][0], found["b_size"][0]) == sizes
        assert (found["a_level"].tolist(), found["b_level"].tolist()) == ([2, 2, 2], [3, -2, 3])


def test_access_flags_only_when_asked():
    a, b = worked_example().rows(), edited((THIRD, 1), 0x9000 | RW | LEAF)
    (row,) = dump.diff(a, b, access_flag=True)
    assert (row["start"], row["kind"], row["a_young"], row["b_young"]) == (0x1000, Difference.ACCESS_FLAG, 1, 0)


def test_the_run_that_is_not_printed():
    """It may be what the other side has there; if that cannot be one run, it is taken for not mapped."""
    image = Image()
    image.set(ROOT, 3, 0xC000_0000 | RW | AF | BLOCK)
    text = dump.parse_kernel_text(dump.kernel_text(image.rows()))
    assert len(text) == 1 and len(dump.diff(image.rows(), text)) == 0 and len(dump.diff(Image().rows(), text)) == 0
    image.set(ROOT, 2, 0x8000_0000 | R | AF | BLOCK)
    found = dump.diff(image.rows(), text)
    assert [(row["start"], row["end"], row["kind"]) for row in found] == [(2 * G, 3 * G, Difference.MISSING)]
    image.set(ROOT, 3, 0xC000_0000 | R | AF | BLOCK)        # one run over where the text ends, as it may be there
    (row,) = dump.diff(text, image.rows())
    assert (row["start"], row["end"], row["kind"]) == (2 * G, 3 * G, Difference.EXTRA)
    image.set(ROOT, 1, 0x4000_0000 | R | AF | BLOCK)
    text = dump.parse_kernel_text(dump.kernel_text(image.rows()) + "0x0000000040000000-0x0000000080000000           1G "
                                  "1   R   px ux  AF BLK\n")
    (row,) = dump.diff(text, image.rows())                  # but not if it is what the last line says: that would go on
    assert (row["start"], row["end"], row["kind"]) == (2 * G, 4 * G, Difference.EXTRA)


def test_texts_of_two_hosts():
    a = dump.parse_kernel_text(GOLDEN)
    b = dump.parse_kernel_text(dump.kernel_text(edited((THIRD, 1), 0x9000 | R | AF | LEAF)))
    (row,) = dump.diff(a, b)
    assert (row["start"], row["end"], row["kind"]) == (0x1000, 0x2000, Difference.PERMISSION)
    assert (row["a_size"], row["b_size"], row["a_level"]) == (0, 0, 3)
    assert len(dump.diff(a, a)) == 0 and len(dump.diff(a[:0], a[:0])) == 0


# --- captures ----------------------------------------------------------------------------------------------------

EVERY_FAMILY = ["a_storm_max_7.2/10_final", "b2_linux_l2_4k_7.2/04_balloon_back", "b_linux_l2_thp_7.2/09_final",
                "c_storm_lpa2_7.2/10_final", "d_vmid_rollover_nvhe_7.2/00_vms_110",
                "g2_nested_notifier_7.2/10_final", "g_nested_7.2/02_dirtylog_on"]
WHOLE = os.environ.get("S2SHADOW_CAPTURES")


def check_snapshot(snap):
    """Each table of a snapshot: the slow formatter's text from the raw pages, and back."""
    for which, file, vttbr, vtcr, *_ in list(snap.roots)[:6]:
        cfg = s2.Stage2Config(vttbr, vtcr, features=s2.Features(pa_bits=snap.pa_bits, lpa=snap.pa_bits == 52,
                                                                lpa2=snap.pa_bits == 52))
        words = {address + 8 * i: word for address, page in snap.pages(file).items()
                 for i, word in enumerate(page.tolist())}
        if vtcr >> 32 & 1:      # table addresses of these captures stay below 2^48
            assert all(word >> 48 & 3 == 0 for word in words.values())
        count = 1 << cfg.ia_bits - (39 - 9 * cfg.start_level)
        mem = s2.GuestMemory()
        low = min(snap.pages(file))
        mem.add(low, max(snap.pages(file)) + PAGE - low)
        for address, page in snap.pages(file).items():
            mem.write(address, page.tobytes())
        rows = dump.ranges(mem, cfg)
        text = dump.kernel_text(rows)
        assert text == slow_text(words.__getitem__, cfg.baddr, cfg.start_level, count), which
        back = dump.parse_kernel_text(text)
        assert dump.kernel_text(back) == text
        assert len(dump.diff(rows, back, access_flag=True)) == 0
        assert dump.from_records(dump.records(rows)).tolist() == rows.tolist()


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_captures(name):
    check_snapshot(snapshots.load(name))


@pytest.mark.skipif(WHOLE is None, reason="S2SHADOW_CAPTURES names no folder of whole captures")
def test_whole_captures():
    names = sorted(path.parent for path in Path(WHOLE).glob("*/*/registers.json"))
    assert names, f"no snapshot below S2SHADOW_CAPTURES={WHOLE}"
    for path in names:
        check_snapshot(snapshots.Snapshot(path, json.loads((path / "registers.json").read_text())))


# --- shadows of the engine ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pa_bits", [40, 42, 44, 48])
def test_shadow_ranges(pa_bits):
    """The shadow as another machine would see it: its live entries, with one start table and with several."""
    r = Rig(features=s2.Features(pa_bits=pa_bits), host=False)
    r.vm.host.map(RAM, 0x2_0000_0000, 64 * M)
    r.tables.map_range(0, DATA, 4 * M)
    r.tables.map_range(64 * M, DATA, 8 * M, level=2, perm="rx")
    r.load()
    for ipa in (*range(0, 4 * M, 52 * K), 64 * M, 71 * M):
        assert r.fault(ipa & -PAGE).kind == s2.MAPPED
    index = r.vm.contexts[0].index
    rows = dump.shadow_ranges(r.vm, index)
    shadow = r.vm.shadow(index)
    assert unrolled(rows) == [tuple(row) for row in shadow[LEAF_NAMES].tolist()] and len(shadow) > 70
    assert tiles(rows, 64 - (r.vm.contexts[0].host_vtcr & 63))
    with pytest.raises(ValueError, match="no context 7"):
        dump.shadow_ranges(r.vm, 7)
