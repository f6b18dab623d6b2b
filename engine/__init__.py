"""The same numbers, computed cheaply: models, caches, packed trees, memory."""

import logging

# It reports a missing optional kernel while it is imported, which peft does.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
