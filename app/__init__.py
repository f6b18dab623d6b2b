"""Flags, files and tables. A command imports it first: Ctrl-C ends it while the libraries load."""

import os
import signal
import sys


def stop_at_once(number, frame):
    os.write(2, b"stopped\n")
    os._exit(128 + number)


command = os.path.basename(sys.argv[0]) in ("arpo_mini.py", "-m")  # no notebook, no test
if command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop_at_once)
