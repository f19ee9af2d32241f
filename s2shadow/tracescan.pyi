import numpy as np
import numpy.typing as npt

NUMBERS: int

class Template:
    names: tuple[str, ...]
    code: int
    def __init__(self, template: str, code: int = 0) -> None: ...

def scan_text(
    block: bytes,
    first_line: int,
    templates: dict[bytes, Template],
    rows: npt.NDArray[np.void],
    values: npt.NDArray[np.uint64],
    codes: npt.NDArray[np.uint8],
    others: dict[bytes, int],
    odd: list[tuple[int, bytes]],
) -> tuple[int, int]: ...
def scan_lines(
    block: bytes,
    first_line: int,
    template: Template,
    values: npt.NDArray[np.uint64],
    numbers: npt.NDArray[np.uint64],
    odd: list[tuple[int, bytes]],
) -> tuple[int, int]: ...
