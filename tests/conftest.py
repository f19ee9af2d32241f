"""Paths, and the settings that every test shares."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
pytest.register_assert_rewrite("lockstep", "rig", "vectors")  # helpers that assert: let a failure say what differs

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("default", deadline=None, max_examples=100, suppress_health_check=SLOW)
settings.register_profile("long", deadline=None, max_examples=5000, suppress_health_check=SLOW)
settings.load_profile("long" if os.environ.get("S2SHADOW_LONG") == "1" else "default")
