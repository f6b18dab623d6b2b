"""The same numbers, computed cheaply: models, caches, packed trees, memory."""

import logging

# It reports a missing optional kernel while it is imported, which peft does.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# It reports every retry of a download; the end of it is one line of ours.
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
