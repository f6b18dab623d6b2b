"""What tests share is in common.py. The process that only hands them out (xdist) goes without."""

import gc


def pytest_configure(config):
    if not config.getoption("numprocesses", default=None):
        import common

        config.pluginmanager.register(common)
        gc.freeze()  # else each collection looks through all of torch, a third of a second
