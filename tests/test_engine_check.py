"""vm.check() is no formality: it notices what must not be."""

import pytest

import s2shadow
from rig import DATA, PAGE, RAM, M, Rig
from s2shadow import READ, WRITE

W, PRIVILEGED, UNPRIVILEGED = 1 << 7, 1 << 53, 1 << 54


@pytest.fixture
def r():
    """A page and a block; the host's page below the first is read-only."""
    r = Rig()
    r.tables.map_range(0, DATA, 4 * PAGE)
    r.tables.map(2 * M, DATA + 2 * M, 2)
    r.vm.host.protect(DATA, DATA + PAGE, "rx")
    r.fault(0, READ)
    r.fault(PAGE, WRITE)
    assert r.fault(2 * M, WRITE).size == 2 * M
    r.vm.check()
    return r


def broken(r, index, ipa, flip):
    r.vm._poke(index, ipa, flip)
    with pytest.raises(s2shadow.InvariantError) as found:
        r.vm.check()
    r.vm._poke(index, ipa, flip)
    r.vm.check()
    return str(found.value)


def test_is_an_assertion():
    """InvariantError is an AssertionError."""
    assert issubclass(s2shadow.InvariantError, AssertionError)


@pytest.mark.parametrize("bit", [12, 13, 20, 30, 47])
@pytest.mark.parametrize("index", [0, None], ids=["shadow", "host"])
def test_wrong_page(r, index, bit):
    """A leaf that leads elsewhere than the host's, whichever of the two is wrong."""
    assert "PA" in broken(r, index, 0 if index == 0 else DATA, 1 << bit)


@pytest.mark.parametrize("bit", [21, 30, 47])
def test_wrong_block(r, bit):
    """The same for a block."""
    assert "PA" in broken(r, 0, 2 * M, 1 << bit)


def test_too_many_permissions(r):
    """A shadow that allows a write that the host does not; a host that takes away what the shadow allows."""
    assert "allows" in broken(r, 0, 0, W)
    for flip in (1 << 6, UNPRIVILEGED):
        assert "allows" in broken(r, None, DATA, flip)


@pytest.mark.parametrize("index", [0, None], ids=["shadow", "host"])
def test_vanished_leaf(r, index):
    """An entry that became invalid behind the engine's back."""
    broken(r, index, 0 if index == 0 else DATA, 1)


@pytest.mark.parametrize("bit", [55, 56, 57])
def test_wrong_guest_level(r, bit):
    """A leaf that claims another level of L1's."""
    assert "level" in broken(r, 0, 0, 1 << bit)


def test_beyond_the_input_size():
    """A leaf in the part of a shadow's root that its context's addresses do not reach."""
    r = Rig()
    table = RAM + M
    r.mem.write64(table, DATA | 0x7FD)
    r.vcpu.load(1 << 48 | table, 64 - 25 | 5 << 16, hcr=s2shadow.HCR_VM)
    assert r.fault(0, WRITE).size == 2 * M
    assert "input size" in broken(r, 1, 1 << 25, int(r.shadow(1)["desc"][0]))


def test_fewer_permissions_are_fine(r):
    """Missing permissions and a cleared access flag are legal at any time."""
    for flip in (W, 1 << 10, UNPRIVILEGED, UNPRIVILEGED | PRIVILEGED):
        r.vm._poke(0, PAGE, flip)
        r.vm.check()
        r.vm._poke(0, PAGE, flip)


@pytest.mark.parametrize("bit", [1, 11, 48, 49, 50, 51, 52, 59, 63])
def test_stray_bits(r, bit):
    """Bits that the engine never writes: hardware would read the leaf otherwise than the engine does. 58 is its own."""
    broken(r, 0, 0, 1 << bit)
