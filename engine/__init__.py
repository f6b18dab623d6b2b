"""The same numbers, computed cheaply: models, caches, packed trees, memory."""

import logging
import os

# Nothing is compiled here. bitsandbytes would load the compiler, which takes a second.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
for name in ("bitsandbytes", "huggingface_hub"):  # a missing optional kernel, retried downloads
    logging.getLogger(name).setLevel(logging.ERROR)
