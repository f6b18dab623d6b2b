"""Comparisons, cold starts, measurements."""

import app  # noqa: F401  # first: Ctrl-C ends it while the libraries load
