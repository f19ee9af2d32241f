"""Loading captures: the real ones, and every way in which one can be damaged."""

import io
import json
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import s2shadow as s2
from s2shadow.capture import CaptureError, load_tables, shipped
from s2shadow.constants import size_text

CAPTURES = Path(__file__).parent / "data" / "captures"
SNAPSHOTS = sorted(path.parent for path in CAPTURES.glob("*/*/tables.npz"))
NESTED = [path for path in SNAPSHOTS if (path / "l1_tables.npz").exists()]

BASE = 0x4000_0000
VTCR = 0x802D3558       # 4K granule, 40-bit IPA from level 1, two start tables
LEAF = 0x7DB


def name_of(path):
    return f"{path.parent.name}/{path.name}"


def leaf_counts(mem, vm):
    sizes = s2.leaves(mem, vm.config())["size"].tolist()
    return {size_text(size): count for size, count in Counter(sizes).items()}


def registers(**changes):
    data = {"vms": [{"vm": 0, "vttbr_el2": hex(1 << 48 | BASE | 1), "vtcr_el2": hex(VTCR), "hcr_el2": "0x400000000001",
                     "tables_by_level": {"1": 1, "2": 1, "3": 1}, "leaves": {"4K": 1}}], "ram_base": hex(BASE)}
    data.update(changes)
    return data


def small_tables(output=0x4500_0000):
    """Two start tables, a level-2 and a level-3 table with one page at IPA 0."""
    words = np.zeros((4, 512), dtype="<u8")
    words[0, 0] = BASE + 0x2000 | 3
    words[2, 0] = BASE + 0x3000 | 3
    words[3, 0] = output | LEAF
    addresses = BASE + np.arange(4, dtype=np.uint64) * np.uint64(0x1000)
    return addresses, words.view(np.uint8).reshape(4, 4096)


@pytest.fixture
def snapshot(tmp_path):
    """Writes a small capture; arguments replace what is in it."""
    def write(*tables, json_data=None, arrays=None):
        if arrays is None:
            arrays = dict(zip(("addresses", "pages"), tables or small_tables(), strict=True))
        np.savez_compressed(tmp_path / "tables.npz", **arrays)
        text = json.dumps(registers() if json_data is None else json_data)
        (tmp_path / "registers.json").write_text(text)
        return tmp_path
    return write


# --- what is there ---------------------------------------------------------------------------------------------


def test_all_snapshots_are_here():
    assert len(SNAPSHOTS) == 66 and len(NESTED) == 22


@pytest.mark.parametrize("path", SNAPSHOTS, ids=name_of)
def test_leaves_are_what_registers_json_says(path):
    mem = s2.GuestMemory()
    capture = mem.load_tables(path, which="host")
    said = json.loads((path / "registers.json").read_text())
    assert [vm.vm for vm in capture.vms] == [vm["vm"] for vm in said["vms"]]
    for vm, record in zip(capture.vms, said["vms"], strict=True):
        assert leaf_counts(mem, vm) == record["leaves"] == dict(vm.leaves)
        assert (vm.vmid, vm.granule, vm.ipa_bits, vm.start_level, vm.concatenated) == (
            record["vmid"], record["granule"], record["ipa_bits"], record["start_level"],
            record["concatenated_start_tables"])
        assert vm.baddr == int(record["baddr"], 16)


@pytest.mark.parametrize("path", NESTED, ids=name_of)
def test_nested_auto_takes_l1s_tables(path):
    mem = s2.GuestMemory()
    capture = mem.load_tables(path)
    said = json.loads((path / "registers.json").read_text())["nested"]
    assert len(capture.nested) == len(said)
    for vm, record in zip(capture.vms, said, strict=True):
        assert vm.vttbr == int(record["l1_vttbr_el2"], 16) and vm.vtcr == int(record["l1_vtcr_el2"], 16)
        assert sum(leaf_counts(mem, vm).values()) == sum(vm.leaves.values()) == record["l1_leaves"]


@pytest.mark.parametrize("path", NESTED, ids=name_of)
def test_host_table_of_nested_captures(path):
    """host is what ``vm.host.load`` takes; its root is among its pages and holds the leaves that L0 said."""
    capture = s2.GuestMemory().load_tables(path)
    said = json.loads((path / "registers.json").read_text())["l0_table_for_l1"]
    addresses, pages, vttbr, vtcr = capture.host
    assert (vttbr, vtcr) == (int(said["vttbr_el2"], 16), int(said["vtcr_el2"], 16))
    host = s2.GuestMemory()
    load_tables(host, path, which="host")
    assert len(s2.leaves(host, s2.Stage2Config(vttbr, vtcr, hcr=capture.vms[0].hcr))) == said["leaves"]
    assert len(addresses) == len(pages)


def test_plain_captures_have_no_host_table():
    capture = s2.GuestMemory().load_tables(shipped())
    assert capture.host is None and capture.nested == ()


def test_shipped_capture():
    mem = s2.GuestMemory()
    (vm,) = mem.load_tables(shipped()).vms
    assert vm.leaves == {"4K": 64410} and vm.tables == {1: 1, 2: 2, 3: 133}
    assert vm.concatenated == 2 and vm.ipa_bits == 40 and vm.vmid == 1
    assert sum(path.stat().st_size for path in shipped().iterdir()) < 2 << 20
    assert "7.2.13" in (shipped() / "ORIGIN.md").read_text()


def test_table_pages_are_at_their_addresses_in_one_region():
    mem = s2.GuestMemory()
    capture = mem.load_tables(shipped())
    with np.load(shipped() / "tables.npz") as archive:
        for address, page in zip(archive["addresses"].tolist(), archive["pages"], strict=True):
            assert mem.read(address, 4096) == page.tobytes()
    (region,) = mem.regions
    assert (region.start, region.start + region.size) == capture.ram
    ends = s2.leaves(mem, capture.vms[0].config())
    assert capture.ram[1] == -(-int((ends["pa"] + ends["size"]).max()) // (2 << 20)) * (2 << 20)


def test_ram_reaches_to_the_highest_page_or_output(snapshot):
    capture = s2.GuestMemory().load_tables(snapshot(*small_tables(output=0x1_2345_6000)))
    assert capture.ram == (BASE, 0x1_2360_0000)
    capture = s2.GuestMemory().load_tables(snapshot(*small_tables(output=0x800_0000)))     # a device below RAM
    assert capture.ram == (BASE, BASE + (2 << 20))


def test_pages_in_any_order(snapshot):
    addresses, pages = small_tables()
    mem = s2.GuestMemory()
    capture = mem.load_tables(snapshot(addresses[::-1], pages[::-1]))
    assert s2.walk(mem, capture.vms[0].config(), 0x123).pa == 0x4500_0123


def test_optional_fields(snapshot):
    """A capture of one's own needs only the registers that a walk needs."""
    data = {"vms": [{"vttbr_el2": BASE, "vtcr_el2": VTCR}]}
    capture = s2.GuestMemory().load_tables(snapshot(json_data=data))
    (vm,) = capture.vms
    assert (vm.vm, vm.leaves, vm.tables, vm.hcr) == (0, {"4K": 1}, {}, s2.HCR_VM)
    assert capture.ram[0] == BASE


def test_lpa2_capture_walks_with_its_own_features():
    mem = s2.GuestMemory()
    capture = mem.load_tables(CAPTURES / "c_storm_lpa2_7.2" / "01_populated")
    assert all(vm.features.lpa2 for vm in capture.vms)
    wide = max(capture.vms, key=lambda vm: vm.ipa_bits)
    assert wide.ipa_bits == 52 and wide.concatenated == 16 and wide.config().error is None


# --- what is wrong ---------------------------------------------------------------------------------------------


def refused(path, message, which="auto", mem=None):
    mem = s2.GuestMemory() if mem is None else mem
    before = mem.regions
    with pytest.raises(CaptureError) as info:
        load_tables(mem, path, which=which)
    text = str(info.value)
    assert message in text and "\n" not in text, text
    assert mem.regions == before


def test_missing_folder():
    refused("nowhere", "no capture at nowhere: tables.npz is missing")


def test_missing_registers(snapshot):
    path = snapshot()
    (path / "registers.json").unlink()
    refused(path, f"no capture at {path}: registers.json is missing")


def test_folder_of_snapshots():
    refused(CAPTURES / "b2_linux_l2_4k_7.2", "(snapshots inside: 00_booting … 09_final)")


def test_file_instead_of_folder(snapshot):
    path = snapshot() / "tables.npz"
    refused(path, f"no capture at {path}: it is a file; name the folder")


def test_l1_tables_where_no_guest_hypervisor_ran(snapshot):
    path = snapshot()
    refused(path, f"no l1_tables.npz at {path}", which="l1")


def test_unknown_which(snapshot):
    with pytest.raises(ValueError, match="which must be one of auto, l1, host, tables, got 'l2'"):
        load_tables(s2.GuestMemory(), snapshot(), which="l2")


def test_truncated_archive(snapshot):
    path = snapshot()
    data = (path / "tables.npz").read_bytes()
    for size in (0, 1, 100, len(data) // 2, len(data) - 1):
        (path / "tables.npz").write_bytes(data[:size])
        refused(path, "tables.npz is damaged")


def test_flipped_bytes_never_escape(snapshot):
    """Any damage is either noticed or harmless; no other exception, nothing half-added."""
    path = snapshot()
    good = (path / "tables.npz").read_bytes()
    rng = np.random.default_rng(1)
    noticed = 0
    for at in rng.integers(0, len(good), 300):
        data = bytearray(good)
        data[at] ^= int(rng.integers(1, 256))
        (path / "tables.npz").write_bytes(data)
        mem = s2.GuestMemory()
        try:
            mem.load_tables(path)
        except CaptureError as error:
            noticed += 1
            assert "\n" not in str(error) and mem.regions == ()
    assert noticed > 100


def test_pickles_are_never_read(snapshot):
    path = snapshot(np.array([{"a": 1}], dtype=object), PAGES)
    refused(path, "tables.npz is damaged")


def test_single_array_file(snapshot):
    path = snapshot()
    with open(path / "tables.npz", "wb") as file:
        np.save(file, np.arange(4))
    refused(path, "a single array, not an .npz archive")


def test_huge_declared_size(snapshot):
    """A header may promise petabytes; they are not allocated, or the failure is a message."""
    path = snapshot()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 38, 4096)})
    addresses = io.BytesIO()
    np.save(addresses, np.array([BASE], dtype=np.uint64))
    with zipfile.ZipFile(path / "tables.npz", "w") as archive:
        archive.writestr("addresses.npy", addresses.getvalue())
        archive.writestr("pages.npy", header.getvalue())
    refused(path, "tables.npz is damaged")


ADDRESSES, PAGES = small_tables()


@pytest.mark.parametrize("arrays, message", [
    ({"pages": PAGES}, "array 'addresses' is missing"),
    ({"addresses": ADDRESSES}, "array 'pages' is missing"),
    ({"addresses": ADDRESSES.astype(np.int64), "pages": PAGES}, "addresses must be uint64[N], got int64[4]"),
    ({"addresses": ADDRESSES[None], "pages": PAGES}, "addresses must be uint64[N], got uint64[1, 4]"),
    ({"addresses": ADDRESSES, "pages": PAGES.astype(np.int8)}, "pages must be uint8[N, 4096], got int8[4, 4096]"),
    ({"addresses": ADDRESSES, "pages": PAGES[:, :512]}, "pages must be uint8[N, 4096], got uint8[4, 512]"),
    ({"addresses": ADDRESSES[:3], "pages": PAGES}, "3 addresses but 4 pages"),
    ({"addresses": ADDRESSES[:0], "pages": PAGES[:0]}, "no table pages"),
    ({"addresses": ADDRESSES + np.uint64(8), "pages": PAGES}, "address 0x40000008 is not aligned to 4096 bytes"),
    ({"addresses": ADDRESSES[[0, 1, 1, 2]], "pages": PAGES}, "address 0x40001000 appears twice"),
    ({"addresses": ADDRESSES | np.uint64(1 << 60), "pages": PAGES}, "is beyond 52 bits"),
    ({"addresses": ADDRESSES - np.uint64(1 << 20), "pages": PAGES}, "which registers.json names, is not in it"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_arrays(snapshot, arrays, message):
    refused(snapshot(arrays=arrays), message)


def vm_without(field):
    data = registers()
    del data["vms"][0][field]
    return data


def vm_with(**fields):
    data = registers()
    data["vms"][0].update(fields)
    return data


@pytest.mark.parametrize("data, message", [
    ([], "the file must be an object, got list"),
    ({"ram_base": "0x40000000"}, "vms is missing"),
    (registers(vms=[]), "vms is empty"),
    (registers(vms={}), "vms must be a list, got dict"),
    (registers(vms=[1]), "vms[0] must be an object, got int"),
    (vm_without("vttbr_el2"), "vms[0].vttbr_el2 is missing"),
    (vm_without("vtcr_el2"), "vms[0].vtcr_el2 is missing"),
    (vm_with(vttbr_el2="zz"), "vms[0].vttbr_el2 must be a number below 2^64, got 'zz'"),
    (vm_with(vttbr_el2=-1), "vms[0].vttbr_el2 must be a number"),
    (vm_with(vtcr_el2=1.5), "vms[0].vtcr_el2 must be a number"),
    (vm_with(vtcr_el2=True), "vms[0].vtcr_el2 must be a number"),
    (vm_with(vttbr_el2=1 << 64), "vms[0].vttbr_el2 must be a number"),
    (vm_with(tables_by_level={"top": 1}), "vms[0].tables_by_level must be keyed by level"),
    (vm_with(leaves={"4K": "many"}), "vms[0].leaves.4K must be a number"),
    (registers(ram_base="0x50000000"), "table page 0x40000000 lies below ram_base 0x50000000"),
    (registers(ram_base="high"), "ram_base must be a number"),
    (registers(ram_base=BASE - 8), "cannot be loaded: base 0x3ffffff8 is not aligned"),
    (registers(nested=[{"vm": 0}]), "nested[0].l1_vttbr_el2 is missing"),
    (registers(l0_table_for_l1={"vttbr_el2": "0x7000", "vtcr_el2": hex(VTCR)}), "L0's table at 0x6000, which"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_registers(snapshot, data, message):
    refused(snapshot(json_data=data), message)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff\xfe", '{"vms": [NaN]'])
def test_registers_that_are_not_json(snapshot, text):
    path = snapshot()
    (path / "registers.json").write_bytes(text.encode("latin-1"))
    refused(path, "registers.json")


def test_l1_tables_that_no_register_names(snapshot):
    path = snapshot()
    (path / "l1_tables.npz").write_bytes((path / "tables.npz").read_bytes())
    refused(path, "nested is missing, so nothing names the tables of l1_tables.npz")


def test_overlap_with_what_is_there(snapshot):
    mem = s2.GuestMemory()
    mem.add(BASE + (1 << 20), 4096)
    refused(snapshot(), "overlaps", mem=mem)


def test_looping_tables(snapshot):
    """Every entry of both lower tables points back: hundreds of millions of leaves, refused in a moment."""
    addresses, pages = small_tables()
    words = pages.view("<u8").copy()
    words[:2] = BASE + 0x2000 | 3
    words[2] = BASE + 0x3000 | 3
    words[3] = 0x4500_0000 | LEAF
    refused(snapshot(addresses, words.view(np.uint8).reshape(4, 4096)), "the table of VM 0 is damaged")


def test_outputs_at_the_end_of_the_address_space(snapshot):
    """A leaf at the top of 48 bits would need 256 TiB of RAM around it: refused, or sparse; never half-added."""
    path = snapshot(*small_tables(output=(1 << 48) - 4096))
    mem = s2.GuestMemory()
    try:
        mem.load_tables(path)
    except CaptureError as error:
        assert "its RAM would span [0x40000000, 0x1000000000000)" in str(error)
        assert mem.regions == ()
