"""The marks of tests that run only with EVOLINK_TEST_SLOW=1, as in .ci/run."""

from __future__ import annotations

import os

import pytest

RUNS_SLOW_TESTS = bool(os.environ.get("EVOLINK_TEST_SLOW"))
SLOW = [pytest.mark.slow, pytest.mark.skipif(not RUNS_SLOW_TESTS, reason="EVOLINK_TEST_SLOW=1 runs it")]
