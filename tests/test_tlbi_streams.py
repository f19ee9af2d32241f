"""``bench/tlbi_streams.py`` on the stream in the repository: exact removes what is required and no more."""

import lzma
from pathlib import Path

import numpy as np
import pytest

import s2shadow as s2
import tlbi_streams as streams

SNAPSHOTS = sorted(path.parent for path in (streams.SNAPSHOTS / "b2_linux_l2_4k_7.2").glob("*/tables.npz"))


@pytest.fixture(scope="module")
def stream():
    seqs, ops = streams.load_stream(streams.SHIPPED)
    picked = np.sort(np.random.default_rng(3).choice(len(ops), 300, replace=False))
    return seqs[picked], ops[picked]


def test_the_shipped_stream():
    seqs, ops = streams.load_stream(streams.SHIPPED)
    assert len(seqs) == len(ops) == 20_000 and (np.diff(seqs.astype(np.int64)) > 0).all()
    assert set(ops["flags"]) == {1} and set(ops["vttbr"] >> np.uint64(48)) == {1}
    assert streams.SHIPPED.stat().st_size < 300_000


@pytest.mark.parametrize("shadowed", [1.0, 0.9])
def test_exact_removes_what_is_required(stream, shadowed):
    table, strangers = streams.replay(*stream, SNAPSHOTS, shadowed)
    assert strangers == 0
    assert sum(row.operations for row in table.values()) == 300
    for (name, there), row in table.items():
        assert row.exact == row.required == row.refaults_exact
        assert row.kvm72 == row.refaults_kvm72 >= row.required
        if not there:
            assert row.required == 0
        if name == "IPAS2E1 TTL level 3":
            assert row.needless == 0
    if shadowed < 1:
        absent = table["IPAS2E1 without TTL", False]
        assert absent.operations > 5 and absent.needless > 1000 * absent.operations
    total = streams.table_rows(table)[-1]
    assert total[0] == "all" and total[2] == "300"


def test_it_runs(capsys):
    streams.main(["--limit", "20", "--markdown"])
    out = capsys.readouterr().out
    assert out.startswith("### b2_linux_l2_4k_7.2, first 20,000, 100% shadowed\n\n| operation | named leaf |")
    assert "| all |  | 20 |" in out


def test_reading_a_stream(tmp_path):
    """By instruction word, with the registers of the line; EL1's, stage-1 operations and other events are left out."""
    path = tmp_path / "tlbi.csv.xz"
    head = "seq,us,vcpu,el,event,op,insn,xt,x1,vttbr_el2,vtcr_el2,hcr_el2"
    lines = [
        "7,1,0,2,TLBI,ipas2e1is,d50c8020,90a0,0,100010502e001,802d3558,480000038",
        "8,1,0,2,VTTBR,,d51c211f,1,0,0,0,0",
        "9,1,1,2,TLBI,placeholder,d50c8041,618000010000,0,1000111a0e001,802d355c,480000038",
        "10,1,1,1,TLBI,ipas2e1is,d50c8020,90a0,0,0,0,0",
        "11,1,1,2,TLBI,vmalle1is,d508831f,0,0,100010502e001,802d3558,480000038",
        "12,1,1,2,TLBI,vmalls12e1is,d50c83df,0,0,200010502e001,802d3558,480000038",
    ]
    path.write_bytes(lzma.compress("\n".join([head, *lines, ""]).encode()))
    seqs, ops = streams.read_stream(path)
    assert seqs.tolist() == [7, 9, 12] and ops.dtype == s2.TLBI_OP_DTYPE
    assert [hex(insn) for insn in ops["insn"]] == ["0xd50c8020", "0xd50c8041", "0xd50c83df"]
    assert ops[1].tolist() == (0, 1, 0xD50C8041, 0x618000010000, 0x1000111A0E001, 0x802D355C, 0x480000038)
    kinds = [streams.kind_of(row["insn"], row["xt"], row["vtcr"]).name for row in ops]
    assert kinds == ["IPAS2E1 without TTL", "RIPAS2E1 without TTL", "VMALLS12"]


def test_the_description_is_there():
    assert "20,000" in (Path(streams.SHIPPED).parent / "ORIGIN.md").read_text()
