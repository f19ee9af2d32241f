"""L1's physical memory: regions, and the few 64-bit words in them that are not zero."""

READ_ONLY, DEVICE = "read-only", "device"


class Memory:
    def __init__(self):
        self.words = {}
        self.regions = []
        self.writes = []

    def add(self, start, size, readonly=False, device=False):
        self.regions.append((start, start + size, DEVICE if device else READ_ONLY if readonly else None))

    def region(self, address):
        """(start, end, kind) of the region that holds the address, or None."""
        for region in self.regions:
            if region[0] <= address < region[1]:
                return region
        return None

    def read(self, address):
        """The little-endian word at the address, or None where a table walk must not read."""
        region = self.region(address)
        if region is None or region[2] == DEVICE:
            return None
        return self.words.get(address, 0)

    def write(self, address, value):
        """A write by a table walk. False: nothing may be written there."""
        region = self.region(address)
        if region is None or region[2] is not None:
            return False
        self.words[address] = value
        self.writes.append((address, value))
        return True

    def poke(self, address, value):
        """A write by the test, or by L1's software."""
        self.words[address] = value


def swap64(word):
    return int.from_bytes(word.to_bytes(8, "little"), "big")
