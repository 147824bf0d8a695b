"""What every test stands on: the stand-in for the host, before anything of ours is imported."""

from __future__ import annotations

import pytest_bootstrap  # noqa: F401 - importing it is what puts the stubs in place
