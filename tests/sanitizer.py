"""Whether this process runs under AddressSanitizer, where memory and time cannot be measured."""

import ctypes

SANITIZED = hasattr(ctypes.CDLL(None), "__asan_init")
