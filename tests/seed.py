"""Where random tests begin: another place in each run, the same with S2SHADOW_SEED."""

import os

SEED = int(os.environ.get("S2SHADOW_SEED") or str(int.from_bytes(os.urandom(6))), 0)
