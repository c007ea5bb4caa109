"""Properties are tried with the same examples every time, and none of them fails for being slow."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")
