"""Bad arguments: ValueError or TypeError that names the argument, and an engine that is what it was."""

import numpy as np
import pytest

import s2shadow
from rig import DATA, HOST, PAGE, Rig
from s2shadow import HIT, READ

BAD = (ValueError, TypeError)
NO_ADDRESS = [-1, 1 << 64, 1.5, "0x1000", None]


@pytest.fixture
def r():
    r = Rig(vcpus=2)
    r.tables.map_range(0, DATA, 16 * PAGE)
    r.fault(0)
    return r


@pytest.fixture
def cfg():
    return s2shadow.Stage2Config(0, 25 | 1 << 6 | 5 << 16)


@pytest.mark.parametrize("ipa", NO_ADDRESS)
def test_walk_ipa(cfg, ipa):
    """An address that is none, for one walk and for many."""
    mem = s2shadow.GuestMemory()
    with pytest.raises(BAD, match="ipa"):
        s2shadow.walk(mem, cfg, ipa)
    with pytest.raises(BAD, match="ipa"):
        s2shadow.walk_many(mem, cfg, [ipa])


@pytest.mark.parametrize("access", [-1, 256, 1 << 40, 1.5, "r", None])
def test_walk_access(cfg, access):
    """An access that is none."""
    mem = s2shadow.GuestMemory()
    with pytest.raises(BAD, match="access"):
        s2shadow.walk(mem, cfg, 0, access)
    with pytest.raises(BAD, match="access"):
        s2shadow.walk_many(mem, cfg, [0], access)


@pytest.mark.parametrize("name", ["vttbr", "vtcr", "hcr", "s2pir"])
@pytest.mark.parametrize("value", NO_ADDRESS)
def test_registers(name, value):
    """A register value that does not fit into one."""
    values = {"vttbr": 0, "vtcr": 0, name: value}
    with pytest.raises(BAD, match=name):
        s2shadow.Stage2Config(**values)


@pytest.mark.parametrize(("name", "value"), [("mem", None), ("mem", object()), ("cfg", None), ("cfg", 7)])
def test_walk_objects(cfg, name, value):
    """Something else in the place of memory or configuration."""
    args = {"mem": s2shadow.GuestMemory(), "cfg": cfg, "ipa": 0, name: value}
    with pytest.raises(TypeError, match=name):
        s2shadow.walk(**args)
    args["ipas"] = [args.pop("ipa")]
    with pytest.raises(TypeError, match=name):
        s2shadow.walk_many(**args)
    with pytest.raises(TypeError, match=name):
        s2shadow.leaves(args["mem"], args["cfg"])


@pytest.mark.parametrize(
    "out",
    [np.zeros(2, s2shadow.WALK_DTYPE), np.zeros(1, np.uint64), [0], np.zeros((1, 1), s2shadow.WALK_DTYPE)],
    ids=["length", "dtype", "list", "shape"],
)
def test_walk_many_out(cfg, out):
    """An output array of the wrong kind."""
    with pytest.raises(BAD, match="out"):
        s2shadow.walk_many(s2shadow.GuestMemory(), cfg, [0], READ, out=out)


def test_walk_many_readonly_out(cfg):
    """A read-only output array."""
    out = np.zeros(1, s2shadow.WALK_DTYPE)
    out.flags.writeable = False
    with pytest.raises(BAD, match="out|read-only"):
        s2shadow.walk_many(s2shadow.GuestMemory(), cfg, [0], READ, out=out)


def test_walk_many_lengths(cfg):
    """As many accesses as addresses."""
    with pytest.raises(BAD, match="access"):
        s2shadow.walk_many(s2shadow.GuestMemory(), cfg, [0, 1, 2], np.array([1, 1], dtype=np.uint8))


def test_walk_many_accepts(cfg):
    """Lists, strided and signed arrays, and an access for each, are all fine."""
    mem = s2shadow.GuestMemory()
    want = s2shadow.walk_many(mem, cfg, np.array([1, 2], dtype=np.uint64)).tolist()
    for ipas in ([1, 2], np.array([1, 2]), np.array([1, 9, 2, 9], dtype=np.uint64)[::2], np.array([1, 2], np.int32)):
        assert s2shadow.walk_many(mem, cfg, ipas, np.array([1, 1], dtype=np.uint8)).tolist() == want


# the engine


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"vcpus": 0}, "vcpus"),
        ({"vcpus": -1}, "vcpus"),
        ({"vcpus": 2, "contexts": 1}, "contexts"),
        ({"contexts": 0}, "contexts"),
        ({"teardown": "none"}, "teardown"),
        ({"tlbi": "fast"}, "tlbi"),
        ({"attributes": "strictest"}, "attributes"),
        ({"max_table_bytes": -1}, "max_table_bytes"),
        ({"table_base": 0x1001}, "table_base"),
        ({"features": s2shadow.Features(pa_bits=52, lpa=True)}, "pa_bits"),
        ({"features": 48}, "features"),
    ],
    ids=str,
)
def test_vm_options(options, name):
    """Options that do not exist or make no sense."""
    with pytest.raises(BAD, match=name):
        s2shadow.NestedVM(s2shadow.GuestMemory(), **options)


def test_vm_memory():
    """Something else than a GuestMemory."""
    with pytest.raises(TypeError):
        s2shadow.NestedVM(None)


RANGES = ["unmap", "log_dirty", "dirty_log", "age", "test_young", "protect"]


@pytest.mark.parametrize("call", RANGES)
@pytest.mark.parametrize(
    ("start", "end"),
    [(1, PAGE), (0, PAGE + 8), (PAGE, 0), (-PAGE, PAGE), (0, 1 << 65), (0, None), (0.0, 4096.0), ("a", "b")],
)
def test_ranges(r, call, start, end):
    """Unaligned, backwards, negative, or no numbers: refused by name, nothing happened."""
    args = (start, end, "rx") if call == "protect" else (start, end)
    before = (r.shadow().tolist(), r.host_leaves())
    with pytest.raises(BAD, match="start|end"):
        getattr(r.vm.host if call == "protect" else r.vm, call)(*args)
    assert (r.shadow().tolist(), r.host_leaves()) == before
    assert r.fault(0).kind == HIT
    r.vm.check()


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ((DATA + 1, HOST, PAGE), "cipa"),
        ((DATA, HOST + 8, PAGE), "pa"),
        ((DATA, HOST, 0), "size"),
        ((DATA, HOST, PAGE + 1), "size"),
        ((DATA, 1 << 48, PAGE), "pa"),
        ((DATA, (1 << 48) - PAGE, 2 * PAGE), "pa|size"),
        ((1 << 48, HOST, PAGE), "cipa"),
        ((-PAGE, HOST, PAGE), "cipa"),
        ((DATA, HOST, PAGE, "rwq"), "perm"),
        ((DATA, HOST, PAGE, 7.5), "perm"),
        ((DATA, HOST, PAGE, "rwx", "warm"), "memattr"),
        ((DATA, HOST, PAGE, "rwx", 16), "memattr"),
        ((DATA, HOST, PAGE, "rwx", -1), "memattr"),
    ],
)
def test_host_map(r, args, name):
    """A mapping that no table holds: refused by name, the old one stays."""
    before = r.host_leaves()
    with pytest.raises(BAD, match=name):
        r.vm.host.map(*args)
    assert r.host_leaves() == before
    assert r.fault(0).kind == HIT


def test_partial(r):
    """unmap's partial is split, drop or None."""
    with pytest.raises(ValueError, match="partial"):
        r.vm.unmap(DATA, DATA + PAGE, partial="half")
    assert r.fault(0).kind == HIT


@pytest.mark.parametrize("ipa", NO_ADDRESS)
def test_fault_ipa(r, ipa):
    """An address that is none."""
    for call in (r.vcpu.fault, r.vcpu.translate):
        with pytest.raises(BAD, match="ipa"):
            call(ipa, READ)
    for call in (r.vcpu.fault_many, r.vcpu.translate_many):
        with pytest.raises(BAD, match="ipa"):
            call([ipa], READ)


@pytest.mark.parametrize("access", [-1, 256, 1.5, "r", None])
def test_fault_access(r, access):
    """An access that is none."""
    for call in (r.vcpu.fault, r.vcpu.translate):
        with pytest.raises(BAD, match="access"):
            call(0, access)
    with pytest.raises(BAD, match="access"):
        r.vcpu.fault_many([0], access)


def test_fault_many_out(r):
    """An output array of the wrong kind, and accesses of the wrong number."""
    for out in (np.zeros(2, s2shadow.FAULT_DTYPE), np.zeros(1, np.uint8), np.zeros((1, 1), s2shadow.FAULT_DTYPE)):
        with pytest.raises(BAD, match="out"):
            r.vcpu.fault_many([0], READ, out=out)
    with pytest.raises(BAD, match="access"):
        r.vcpu.fault_many([0, 0], np.array([1], dtype=np.uint8))


@pytest.mark.parametrize("name", ["vttbr", "vtcr", "hcr"])
@pytest.mark.parametrize("value", NO_ADDRESS)
def test_load(r, name, value):
    """Register values that do not fit: refused by name, the old context stays loaded."""
    values = {"vttbr": 0, "vtcr": 0, name: value}
    with pytest.raises(BAD, match=name):
        r.vcpu.load(**values)
    assert r.fault(0).kind == HIT


@pytest.mark.parametrize("index", [-1, 4, 99, "a"])
def test_index(r, index):
    """A context that does not exist."""
    for call in (r.vm.shadow, r.vm.tables):
        with pytest.raises((ValueError, TypeError, IndexError)):
            call(index)


@pytest.mark.parametrize("cipa", NO_ADDRESS)
def test_reverse(r, cipa):
    """An address that is none."""
    with pytest.raises(BAD, match="cipa"):
        r.vm.reverse(cipa)


@pytest.mark.parametrize("limit", [-1, 1.5, "a"])
def test_take_tlbis(r, limit):
    """A limit that is no count."""
    with pytest.raises(BAD, match="limit"):
        r.vm.take_tlbis(limit)


def test_load_table_refused(r):
    """A host table that is no table: refused, the old one stays."""
    before = r.host_leaves()
    addresses, pages = np.array([0x1000], dtype=np.uint64), np.zeros((1, 4096), dtype=np.uint8)
    for args in (
        (addresses, pages[:, :100], 0x1000, r.tables.vtcr),
        (addresses, np.zeros((2, 4096), np.uint8), 0x1000, r.tables.vtcr),
        (addresses, pages, 0x1000, 0),
    ):
        with pytest.raises(BAD):
            r.vm.host.load(*args)
        assert r.host_leaves() == before
    r.vm.check()


def test_unsigned_arrays(r):
    """Addresses may come as any integers; as floats they may not."""
    for ipas in ([0], (0,), np.array([0]), np.array([0], np.int32), range(1)):
        assert r.vcpu.fault_many(ipas, READ)["kind"].tolist() == [HIT]
    with pytest.raises(BAD, match="ipa"):
        r.vcpu.fault_many(np.array([0.0]), READ)
