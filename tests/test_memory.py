"""GuestMemory: what it accepts, what it refuses, and that a refusal changes nothing."""

import gc
import mmap
import subprocess
import sys
import textwrap
import weakref

import numpy as np
import pytest

import s2shadow

PAGE = 4096


@pytest.fixture
def mem():
    return s2shadow.GuestMemory()


def regions(mem):
    return [(r.start, r.size, r.readonly, r.device) for r in mem.regions]


def test_empty(mem):
    """A new one has no regions and nothing to read."""
    assert mem.regions == ()
    with pytest.raises(ValueError):
        mem.read64(0)


def test_owned_is_zero(mem):
    """Engine-owned memory reads as zero and keeps what is written."""
    mem.add(0x1000, 2 * PAGE)
    assert mem.read(0x1000, 2 * PAGE) == bytes(2 * PAGE)
    mem.write64(0x1008, 0x1122_3344_5566_7788)
    assert mem.read64(0x1008) == 0x1122_3344_5566_7788
    assert mem.read(0x1008, 8) == bytes.fromhex("8877665544332211")
    mem.write(0x1FFE, b"abcd")
    assert mem.read(0x1FFD, 6) == b"\0abcd\0"


def test_terabyte_is_sparse(mem):
    """A TiB costs nothing until used, and both ends are there."""
    mem.add(1 << 40, 1 << 40)
    mem.write64((1 << 41) - 8, 7)
    assert mem.read64((1 << 41) - 8) == 7
    assert mem.read64(1 << 40) == 0


def test_regions_sorted(mem):
    """Regions come back in address order with their flags."""
    mem.add(0x8000, PAGE, device=True)
    mem.add(0x1000, PAGE)
    mem.add(0x4000, buffer=bytes(PAGE), readonly=True)
    assert regions(mem) == [
        (0x1000, PAGE, False, False),
        (0x4000, PAGE, True, False),
        (0x8000, PAGE, False, True),
    ]
    assert isinstance(mem.regions[0], s2shadow.Region)


def test_adjacent_regions(mem):
    """Regions may touch; a read or write across the seam is one."""
    mem.add(0x1000, PAGE)
    mem.add(0x2000, PAGE)
    mem.write(0x1FFC, b"12345678")
    assert mem.read(0x1FFC, 8) == b"12345678"


@pytest.mark.parametrize(
    ("start", "size"),
    [(0x2000, PAGE), (0x1000, 2 * PAGE), (0x3000, 2 * PAGE), (0x1000, 0x10000), (0x2000, 3 * PAGE), (0x4000, PAGE)],
)
def test_overlap(mem, start, size):
    """Any overlap is refused, and nothing changes."""
    mem.add(0x2000, 3 * PAGE)
    mem.write64(0x2000, 5)
    before = regions(mem)
    with pytest.raises(ValueError, match="overlap"):
        mem.add(start, size)
    assert regions(mem) == before
    assert mem.read64(0x2000) == 5


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((0x1001, PAGE), {}),
        ((0x1800, PAGE), {}),
        ((0x1000, PAGE + 8), {}),
        ((0x1000, 0), {}),
        ((0x1000, 0), {"device": True}),
        ((0x1000,), {}),  # neither a size nor a buffer
        ((-PAGE, PAGE), {}),
        ((1 << 52, PAGE), {}),
        (((1 << 52) - PAGE, 2 * PAGE), {}),
        ((1 << 64, PAGE), {}),
        ((0x1000,), {"buffer": bytearray()}),
        ((0x1000,), {"buffer": bytearray(PAGE + 1)}),
        ((0x1000, 2 * PAGE), {"buffer": bytearray(PAGE)}),
        ((0x1000,), {"buffer": bytearray(PAGE), "device": True}),
        ((0x1000,), {"buffer": bytes(PAGE)}),
        ((0x1000,), {"buffer": np.zeros((2, 1024), dtype=np.uint64).T}),
        ((0x1000,), {"buffer": np.zeros(2048, dtype=np.uint64)[::2]}),
        ((0x1000,), {"buffer": np.zeros(PAGE + 1, dtype=np.uint8)[1:]}),
    ],
)
def test_refused(mem, args, kwargs):
    """Unaligned, empty, out of reach, or a buffer that cannot serve: nothing changed."""
    mem.add(0x10_0000, PAGE)
    before = regions(mem)
    with pytest.raises((ValueError, OverflowError, TypeError)):
        mem.add(*args, **kwargs)
    assert regions(mem) == before


@pytest.mark.parametrize("buffer", [7, "text", object(), None])
def test_not_a_buffer(mem, buffer):
    """Something that is no buffer at all."""
    with pytest.raises((TypeError, ValueError)):
        mem.add(0x1000, buffer=buffer)
    assert mem.regions == ()


@pytest.mark.parametrize("cipa", ["0x1000", 4096.5, None])
def test_bad_address_type(mem, cipa):
    """An address that is no integer."""
    with pytest.raises(TypeError):
        mem.add(cipa, PAGE)
    assert mem.regions == ()


def test_bytearray_is_shared(mem):
    """Zero copy: both sides see each other's writes, and a bytearray in use cannot be resized."""
    backing = bytearray(2 * PAGE)
    mem.add(0x4000, buffer=backing)
    mem.write64(0x4010, 0xABCD)
    assert backing[0x10:0x12] == b"\xcd\xab"
    backing[PAGE] = 9
    assert mem.read64(0x5000) == 9
    with pytest.raises(BufferError):
        backing.extend(b"x")
    mem.remove(0x4000)
    backing.extend(b"x")


def test_mmap_is_shared(mem):
    """An anonymous mmap, and that it cannot be closed while used."""
    backing = mmap.mmap(-1, PAGE)
    mem.add(0, buffer=backing)
    mem.write(0, b"hello")
    assert backing[:5] == b"hello"
    with pytest.raises(BufferError):
        backing.close()
    mem.remove(0)
    backing.close()


def test_readonly_file(mem, tmp_path):
    """A file mapped read-only serves as a read-only region only."""
    path = tmp_path / "image"
    path.write_bytes(b"\x11" * PAGE)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as backing:
        with pytest.raises(ValueError):
            mem.add(0, buffer=backing)
        mem.add(0, buffer=backing, readonly=True)
        assert mem.read64(0) == 0x1111_1111_1111_1111
        mem.remove(0)


def test_numpy_is_shared(mem):
    """Arrays of any shape and type, as long as they are C-contiguous."""
    backing = np.zeros((4, 512), dtype=np.uint64)
    mem.add(0x1_0000, buffer=backing)
    mem.write64(0x1_1008, 3)
    assert backing[1, 1] == 3
    assert mem.regions[0].size == 4 * PAGE


def test_readonly_numpy(mem):
    """A read-only array needs readonly=True."""
    backing = np.arange(512, dtype=np.uint64)
    backing.flags.writeable = False
    with pytest.raises(ValueError):
        mem.add(0, buffer=backing)
    mem.add(0, buffer=backing, readonly=True)
    assert mem.read64(8) == 1


def test_readonly_over_writable_buffer(mem):
    """readonly is what L1 sees: the embedder's own buffer may be writable, writes through mem are refused."""
    backing = bytearray(PAGE)
    mem.add(0, buffer=backing, readonly=True)
    backing[0] = 1
    assert mem.read64(0) == 1
    with pytest.raises(ValueError):
        mem.write64(0, 2)
    with pytest.raises(ValueError):
        mem.write(0, b"\2")
    assert backing[0] == 1


def test_released_memoryview(mem):
    """A released buffer is refused."""
    view = memoryview(bytearray(PAGE))
    view.release()
    with pytest.raises(ValueError):
        mem.add(0, buffer=view)
    assert mem.regions == ()


def test_failed_add_keeps_no_buffer(mem):
    """After a refusal nothing holds on to the buffer."""
    backing = bytearray(PAGE)
    mem.add(0, PAGE)
    with pytest.raises(ValueError):
        mem.add(0, buffer=backing)
    backing.extend(b"x")


def test_buffer_outlives_its_name(mem):
    """The region keeps the buffer alive, and lets go of it on removal."""

    class Array(np.ndarray):
        pass

    backing = np.zeros(512, dtype=np.uint64).view(Array)
    watch = weakref.ref(backing)
    mem.add(0, buffer=backing)
    del backing
    gc.collect()
    assert watch() is not None
    mem.write64(0, 1)
    mem.remove(0)
    gc.collect()
    assert watch() is None


@pytest.mark.parametrize("address", [0x1001, 0x1004, 0xFF8, 0x2000, 1 << 52, (1 << 64) - 8])
def test_word_outside(mem, address):
    """Unaligned or outside: refused, nothing read or written."""
    mem.add(0x1000, PAGE)
    with pytest.raises(ValueError):
        mem.read64(address)
    with pytest.raises(ValueError):
        mem.write64(address, 1)
    assert mem.read(0x1000, PAGE) == bytes(PAGE)


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_word_too_large(mem, value):
    """A value that is no 64-bit word."""
    mem.add(0x1000, PAGE)
    with pytest.raises((ValueError, OverflowError)):
        mem.write64(0x1000, value)
    assert mem.read64(0x1000) == 0


def test_write_all_or_nothing(mem):
    """A write that leaves writable memory part way writes nothing."""
    mem.add(0x1000, PAGE)
    mem.add(0x2000, buffer=bytes(PAGE), readonly=True)
    for data in (b"x" * (PAGE + 8), b"x" * (3 * PAGE)):
        with pytest.raises(ValueError):
            mem.write(0x1000, data)
    assert mem.read(0x1000, PAGE) == bytes(PAGE)


def test_read_beyond(mem):
    """A read that leaves memory part way is refused."""
    mem.add(0x1000, PAGE)
    for address, n in ((0x1000, PAGE + 1), (0xFFF, 2), (0x1000, -1)):
        with pytest.raises((ValueError, OverflowError)):
            mem.read(address, n)


def test_device_is_not_memory(mem):
    """Devices are neither read nor written."""
    mem.add(0x1000, PAGE, device=True)
    for call in (lambda: mem.read64(0x1000), lambda: mem.write64(0x1000, 1), lambda: mem.read(0x1000, 1)):
        with pytest.raises(ValueError):
            call()


def test_remove(mem):
    """Removal is by start address; the place is free again and comes back zeroed."""
    mem.add(0x1000, 2 * PAGE)
    mem.write64(0x1000, 1)
    for wrong in (0x2000, 0x1008, 0, 0x9000):
        with pytest.raises(ValueError):
            mem.remove(wrong)
    assert len(mem.regions) == 1
    mem.remove(0x1000)
    assert mem.regions == ()
    mem.add(0x1000, PAGE)
    assert mem.read64(0x1000) == 0


def test_many_regions(mem):
    """A few hundred regions, added and removed in disorder, stay apart."""
    order = np.random.default_rng(1).permutation(300).tolist()
    for n in order:
        mem.add(n * 2 * PAGE, PAGE)
        mem.write64(n * 2 * PAGE, n + 1)
    for n in order[:150]:
        mem.remove(n * 2 * PAGE)
    left = sorted(order[150:])
    assert [r.start for r in mem.regions] == [n * 2 * PAGE for n in left]
    assert [mem.read64(n * 2 * PAGE) for n in left] == [n + 1 for n in left]


def test_walk_on_removed_memory(mem):
    """Tables whose region is gone end in an external abort on the walk, not in old memory."""
    mem.add(0x1000, PAGE)
    mem.write64(0x1000, 0x4000_07FD)
    cfg = s2shadow.Stage2Config(0x1000, 25 | 1 << 6 | 5 << 16)
    assert s2shadow.walk(mem, cfg, 0x123).pa == 0x4000_0123
    mem.remove(0x1000)
    assert s2shadow.walk(mem, cfg, 0x123).fault == "external abort on table walk, level 1"


def test_readonly_region_cannot_take_updates(mem):
    """A hardware access-flag update into read-only tables is an external abort, and the tables stay."""
    backing = bytearray(PAGE)
    backing[:8] = (0x4000_03FD).to_bytes(8, "little")
    mem.add(0x1000, buffer=backing, readonly=True)
    cfg = s2shadow.Stage2Config(0x1000, 25 | 1 << 6 | 5 << 16 | 1 << 21)
    assert s2shadow.walk(mem, cfg, 0).fsc == 0x15
    quiet = s2shadow.walk(mem, cfg, 0, update=False)
    assert (quiet.status, quiet.updated) == (0, 1)
    assert backing[:8] == (0x4000_03FD).to_bytes(8, "little")


def test_in_use_by_an_engine(mem):
    """A region cannot be pulled from under an engine, and can when that is gone."""
    mem.add(0x1000, PAGE)
    vm = s2shadow.NestedVM(mem)
    with pytest.raises(ValueError, match="use"):
        mem.remove(0x1000)
    assert len(mem.regions) == 1
    mem.add(0x8000, PAGE)
    with pytest.raises(ValueError, match="use"):
        mem.remove(0x8000)
    del vm
    gc.collect()
    mem.remove(0x1000)
    mem.remove(0x8000)


def test_engine_in_a_cycle(mem):
    """An embedder that holds the engine and a vCPU, and is its populate: the collector frees it all the same."""

    class Embedder:
        def __init__(self, vm):
            self.vm, self.vcpu = vm, vm.vcpus[0]
            vm.host.populate = self.populate

        def populate(self, cipa, access):
            return None

    mem.add(0x1000, PAGE)
    Embedder(s2shadow.NestedVM(mem))
    gc.collect()
    mem.remove(0x1000)


def run_alone(script):
    """In a process of its own, which a deadlock ends."""
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60)


def test_who_owned_a_region_may_use_the_memory_when_it_goes():
    """Also by way of another thread: the lock is free by then."""
    run_alone("""
        import threading
        import s2shadow
        mem = s2shadow.GuestMemory()
        class Owner(bytearray):
            def __del__(self):
                look = threading.Thread(target=lambda: seen.append(len(mem.regions)))
                look.start()
                look.join()
                mem.add(0, 4096)
        seen = []
        mem.add(0, buffer=Owner(4096))
        mem.add(0x10000, 4096)
        mem.remove(0)
        assert seen == [1] and [region.start for region in mem.regions] == [0, 0x10000]
        """)


def test_a_finalizer_may_change_the_memory_amid_a_change():
    """Python collects garbage where the list of owners is made: what a finalizer adds is not lost, nor overlapped."""
    run_alone("""
        import gc
        import sys
        import s2shadow
        mem = s2shadow.GuestMemory()
        added, refused = set(), 0
        class Garbage:
            def __init__(self, start):
                self.itself, self.start = self, start
            def __del__(self):
                if self.start not in added:
                    mem.add(self.start, 4096)
                    added.add(self.start)
        for n in range(400):
            start = n * 8192
            gc.collect()
            gc.set_threshold(1 + n % 20)        # now before the call, now amid it, now after
            Garbage(start if n % 2 else start + 4096)
            try:
                mem.add(start, 4096)
                added.add(start)
            except ValueError as error:
                assert "overlaps" in str(error)
                refused += 1
        gc.set_threshold(0)
        assert sorted(added) == [region.start for region in mem.regions]
        assert refused or sys.version_info >= (3, 12)       # from then on it is collected between bytecodes alone
        for start in added:
            mem.write64(start, start)
        assert all(mem.read64(start) == start for start in added)
        for start in added:
            mem.remove(start)
        assert not mem.regions
        """)
