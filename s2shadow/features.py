"""The architecture features that L1 sees and that the host uses."""

from __future__ import annotations

from dataclasses import dataclass

GRANULES = (4096, 16384, 65536)
PA_BITS = (32, 36, 40, 42, 44, 48, 52)


@dataclass(frozen=True, slots=True)
class Features:
    """Features of the machine that L1 is shown, immutable and hashable.

    ``pa_bits`` is PARange (32, 36, 40, 42, 44, 48 or 52). ``granules`` are the stage-2 granules that are advertised, in
    bytes (4096, 16384, 65536); one below ``host_granule``, the host's own, cannot be, since a shadow leaf could not
    express it: ``ValueError`` if named, left out of the default. ``hafdbs`` is ID_AA64MMFR1_EL1.HAFDBS: 0 none, 1
    access flag, 2 dirty state too. ``vmid_bits`` is 8 or 16. The rest are flags: ``ttl`` (FEAT_TTL), ``range``
    (FEAT_TLBIRANGE), ``xnx`` (FEAT_XNX), ``fwb`` (FEAT_S2FWB), ``lpa`` (FEAT_LPA), ``lpa2`` (FEAT_LPA2 at stage 2),
    ``ttst`` (FEAT_TTST), ``tlbios`` (FEAT_TLBIOS), ``xs`` (FEAT_XS), ``bbm`` (FEAT_BBM), ``s2pie`` (FEAT_S2PIE).
    ``ValueError`` for what no machine has. Source: Arm ARM, ID_AA64MMFR0_EL1 to ID_AA64MMFR3_EL1, ID_AA64ISAR0_EL1,
    ID_AA64ISAR1_EL1.
    """

    pa_bits: int = 48
    granules: tuple[int, ...] = None  # type: ignore[assignment]
    ttl: bool = True
    range: bool = True
    xnx: bool = True
    fwb: bool = True
    lpa2: bool = False
    lpa: bool = False
    ttst: bool = False
    hafdbs: int = 1
    vmid_bits: int = 16
    tlbios: bool = True
    xs: bool = True
    bbm: bool = False
    s2pie: bool = False
    host_granule: int = 4096

    def __post_init__(self):
        if self.pa_bits not in PA_BITS:
            raise ValueError(f"pa_bits must be one of {PA_BITS}, got {self.pa_bits!r}")
        if self.host_granule not in GRANULES:
            raise ValueError(f"host_granule must be one of {GRANULES}, got {self.host_granule!r}")
        if self.hafdbs not in (0, 1, 2):
            raise ValueError(f"hafdbs must be 0, 1 or 2, got {self.hafdbs!r}")
        if self.vmid_bits not in (8, 16):
            raise ValueError(f"vmid_bits must be 8 or 16, got {self.vmid_bits!r}")
        if self.s2pie and not self.xnx:
            raise ValueError("s2pie=True needs xnx=True: base permissions tell EL1 and EL0 execution apart")
        if self.granules is None:
            granules = tuple(g for g in GRANULES if g >= self.host_granule)
        else:
            granules = tuple(sorted(set(self.granules)))
        if not granules:
            raise ValueError("granules must name at least one of 4096, 16384, 65536")
        for granule in granules:
            if granule not in GRANULES:
                raise ValueError(f"granules must be among {GRANULES}, got {granule!r}")
            if granule < self.host_granule:
                raise ValueError(f"granule {granule} is below host_granule {self.host_granule}: "
                                 "it cannot be advertised")
        object.__setattr__(self, "granules", granules)
