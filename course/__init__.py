"""Two classes: one page, exercises, a notebook."""

import app  # noqa: F401  # first: Ctrl-C ends it while the libraries load
