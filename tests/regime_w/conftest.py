"""Property tests: half of hypothesis's usual examples, and no deadline, which a busy machine would miss."""

from hypothesis import settings

settings.register_profile("regime_w", max_examples=50, deadline=None)
settings.load_profile("regime_w")
