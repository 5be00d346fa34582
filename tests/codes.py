"""Exit codes as a parent process sees them."""

import signal

INTERRUPTED = (130, -signal.SIGINT)
"""A shell shows 130 for both. CPython ends by the signal itself where the interrupt, although it was caught, hit code that was made from
a string, as that of dataclasses is while a module is imported."""
