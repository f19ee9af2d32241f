from typing import NamedTuple

from s2shadow.features import Features
from s2shadow.mapping import HostMapping
from s2shadow.walker import Walk

class Combined(NamedTuple):
    desc: int
    size: int
    perm: int
    memattr: int
    sh: int
    guest_level: int

def combine(
    guest: Walk | None,
    host: Walk | HostMapping,
    *,
    features: Features | None = None,
    guest_fwb: bool = False,
    host_fwb: bool = False,
    attributes: str = "architectural",
    guest_cd: bool = False,
) -> Combined: ...
