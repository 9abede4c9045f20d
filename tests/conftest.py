"""What all tests share."""

from __future__ import annotations

from hypothesis import settings

# The same examples on every run, and no time limit per example on a busy machine.
settings.register_profile("house", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("house")
