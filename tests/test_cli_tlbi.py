"""``s2shadow tlbi``: every operation in words, and the words agree with the decoder."""

import csv
import io
import json
from pathlib import Path

import pytest

import s2shadow as s2
from s2shadow.cli import main
from s2shadow.tlbiwords import describe

VTCR_4K, VTCR_16K = 0x802D3558, 0x802D3558 | 2 << 14  # 40 bits both
OPERANDS = [
    0,
    0x47D55,
    0x4000_0008_0123,
    0x7000_0004_2EE9,
    0x2000_0000_0001,
    0xB000_0000_0001,
    0xFFFF_FFFF_FFFF_FFFF,
    0x0123_6018_0000_0000,
]


def all_operations():
    with (Path(__file__).parent / "data" / "tlbi_ops.csv").open() as rows:
        for row in csv.DictReader(rows):
            op1, crn, crm, op2 = (int(row[name]) for name in ("op1", "crn", "crm", "op2"))
            yield row["name"], 0xD5080000 | op1 << 16 | crn << 12 | crm << 8 | op2 << 5


OPERATIONS = list(all_operations())


@pytest.fixture
def lines(capsys):
    def call(*argv):
        assert main(["tlbi", *map(str, argv)]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out.splitlines()

    return call


@pytest.fixture
def refused(capsys):
    def call(*argv):
        assert main(["tlbi", *map(str, argv)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("s2shadow: ") and err.count("\n") == 1
        return err.removeprefix("s2shadow: ").rstrip("\n")

    return call


def test_the_example(lines):
    """The one that users are shown, by word and by name."""
    expected = [
        "RIPAS2E1IS  by IPA range, stage 2 of the current VMID, inner shareable",
        "4K granule, any level, 2 pages: [0x80123000, 0x80125000)",
        "drops every shadow leaf whose L1 mapping touches that range, in all contexts of the VMID with stage 2 on",
        "Linux 7.2 does the same here, and also drops the VMID's whole stage 1",
        "Linux 7.2 does not spare contexts of the VMID with stage 2 off",
    ]
    for op in ("0xd50c8041", "d50c8041", str(0xD50C8041), "RIPAS2E1IS", "ripas2e1is"):
        assert lines(op, "0x0000400000080123") == expected


def test_all_126():
    assert len(OPERATIONS) == len({name for name, _ in OPERATIONS}) == 126


@pytest.mark.parametrize("name, word", OPERATIONS, ids=[name for name, _ in OPERATIONS])
def test_every_operation_has_words(name, word):
    """With every kind of operand: a heading, what it drops, what Linux does; and what they say is what is decoded."""
    for xt in (None, *OPERANDS):
        for vtcr in (None, VTCR_4K, VTCR_16K, VTCR_4K | 1 << 32 | 6 << 16):
            found = describe(name, xt, vtcr)
            assert found == describe(word | 5, xt, vtcr)
            assert found.lines[0].startswith(f"{name}  ")
            assert found.drops and found.linux and all(len(line) <= 130 for line in found.lines), found.lines
            tlbi, text = found.tlbi, "\n".join(found.lines)
            assert "None" not in text and "  " not in text.removeprefix(f"{name}  ")
            if tlbi.start is not None:
                assert f"{tlbi.start:#x}" in found.names
                if name.startswith("R"):
                    assert f"[{tlbi.start:#x}, {tlbi.end:#x})" in found.names
            if tlbi.level is not None and tlbi.start is not None:
                assert f"level {tlbi.level} (" in found.names
            assert ("names nothing" in text) == (tlbi.scope in ("VA", "VAA", "IPA") and tlbi.start is None)
            sharing = {"NSH": "non-shareable", "IS": "inner shareable", "OS": "outer shareable"}[tlbi.shareability]
            assert sharing in found.heading
            assert ("last level" in found.heading) == tlbi.last_level
            assert ("XS" in found.heading.removeprefix(name)) == tlbi.nxs
            if tlbi.asid is not None and tlbi.start is not None:
                assert f"ASID {tlbi.asid}" in found.names


def test_by_ipa(lines):
    assert lines("IPAS2E1IS", "0x47d55") == [
        "IPAS2E1IS  by IPA, stage 2 of the current VMID, inner shareable",
        "any granule, any level, 0x47d55000",
        "drops every shadow leaf whose L1 mapping holds that address, in all contexts of the VMID with stage 2 on",
        "Linux 7.2 takes the size from the shadow leaf that it finds there, and also drops the VMID's whole stage 1",
        "where it finds none it drops the 1G of [0x40000000, 0x80000000), up to 262,144 leaves of 4K",
        "Linux 7.2 does not spare contexts of the VMID with stage 2 off",
    ]


@pytest.mark.parametrize(
    "operand, options, expected",
    [
        ("0x700000042ee9", (), ["4K granule, level 3 (4K pages), 0x42ee9000", "at level 3 and holds that address",
                                "every leaf in the 4K of [0x42ee9000, 0x42eea000), of any level"]),
        ("0x600000042ee9", (), ["level 2 (2M blocks)", "every leaf in the 2M of [0x42e00000, 0x43000000)"]),
        ("0x100000042ee9", (), ["no leaf size has this TTL: any granule, any level", "drops every shadow leaf",
                                "the 1G of [0x40000000, 0x80000000)"]),
        ("0xb00000042ee9", ("--vtcr", hex(VTCR_4K)),
         ["16K granule, level 3 (16K pages)", "drops nothing: VTCR's granule is 4K",
          "the 16K of [0x42ee8000, 0x42eec000)"]),
        ("0x42ee9", ("--vtcr", hex(VTCR_16K)), ["the 32M of [0x42000000, 0x44000000), up to 8,192 leaves of 4K"]),
        ("0xfffffffff", ("--vtcr", hex(VTCR_4K)), ["names nothing: its address is beyond the input size of 40 bits",
                                                   "drops nothing", "Linux 7.2 finds nothing there either"]),
    ],
)  # fmt: skip
def test_by_ipa_with_hints(lines, operand, options, expected):
    text = "\n".join(lines("IPAS2E1", operand, *options))
    for words in expected:
        assert words in text


@pytest.mark.parametrize(
    "operand, options, expected",
    [
        ("0x40800", (), ["names nothing: TG=00 is reserved", "drops nothing",
                         "takes TG=00 for 64K and drops every leaf in [0x408000000, 0x408020000)"]),
        ("0x402000080000", (), ["level 1 (1G blocks), 2 pages", "at level 1 and touches that range",
                                "drops every leaf in that range, of any level"]),
        ("0x800000000010", ("--vtcr", hex(VTCR_4K)), ["16K granule", "drops nothing: VTCR's granule is 4K",
                                                      "whatever the granule"]),
        ("0x40000ffffffff", ("--vtcr", hex(VTCR_4K)), ["names nothing"]),
        ("0x40000fffffff", ("--vtcr", hex(VTCR_4K)), ["1 page, cut at the input size: [0xfffffff000, 0x10000000000)"]),
    ],
)  # fmt: skip
def test_by_range(lines, operand, options, expected):
    text = "\n".join(lines("RIPAS2E1IS", operand, *options))
    for words in expected:
        assert words in text


@pytest.mark.parametrize(
    "op, expected",
    [
        ("VMALLS12E1IS", ["everything of the current VMID, stages 1 and 2",
                          "every context of the VMID, stage 2 on or off",
                          "262,144 steps of 1G over each context of the VMID"]),
        ("ALLE1", ["everything of every VMID", "drops every shadow leaf of every context"]),
        ("ALLE2", ["everything of EL2's stage 1", "no shadow leaf", "virtual EL2 regime"]),
        ("VMALLE1IS", ["everything, stage 1 of EL1&0 of the current VMID", "no shadow leaf", "{E2H,TGE}={1,1}"]),
        ("ASIDE1OS", ["by ASID, stage 1", "ASID 0", "Linux 7.2 does the same, inner shareable"]),
        ("VAALE1NXS", ["by VA, any ASID", "last level only", "exempts XS accesses"]),
        ("RVAE2IS", ["by VA range, stage 1 of EL2"]),
        ("VAE2", ["ASID 0 if E2H=1"]),
    ],
)  # fmt: skip
def test_other_classes(lines, op, expected):
    text = "\n".join(lines(op))
    for words in expected:
        assert words in text


def test_operands_missing_and_needless(lines):
    assert lines("VAE1")[1].endswith("(no operand given: taken as 0)")
    assert lines("VMALLS12E1", "5")[1] == "it takes no operand: the one given does not count"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["NONSENSE"], "no TLBI operation NONSENSE"),
        (["0xd5033fdf"], "no TLBI operation 0xd5033fdf"),
        (["ALLE3"], "TLBI ALLE3: an operation of EL3"),
        (["0x1d50c8041"], "no TLBI operation 0x1d50c8041"),
        (["-1"], ""),
        (["VAE1", "fish"], "XT must be a number such as 0x0000400000080123, got 'fish'"),
        (["VAE1", "0x10000000000000000"], "XT must be between 0 and 2^64, got 0x10000000000000000"),
        (["VAE1", "0", "--vtcr", "x"], "--vtcr must be a number such as 0x802d3558, got 'x'"),
        (["VAE1", "--json", "--csv"], "--json and --csv cannot both go to stdout"),
    ],
)
def test_refused(refused, argv, message):
    assert refused(*argv).startswith(message)


def test_data(lines):
    data = json.loads("\n".join(lines("RIPAS2E1IS", "0x402000080000", "--json")))
    d = s2.decode_tlbi("RIPAS2E1IS", 0x4020_0008_0000)
    assert (data["schema"], data["op"], data["xt"]) == (1, d.name, "0x402000080000")
    assert (int(data["start"], 16), int(data["end"], 16)) == (d.start, d.end)
    assert (data["level"], data["granule"], data["scope"], data["regime"]) == (1, 4096, "IPA", "EL10_S2")
    assert data["words"] == lines("RIPAS2E1IS", "0x402000080000")
    (row,) = csv.DictReader(io.StringIO("\n".join(lines("VAE1", "0x0005700000000001", "--csv"))))
    assert (row["op"], row["start"], row["end"], row["asid"], row["level"]) == ("VAE1", "0x1000", "0x2000", "5", "3")
