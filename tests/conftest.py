"""What tests share is in common.py. The process that only hands them out (xdist) goes without."""


def pytest_configure(config):
    if not config.getoption("numprocesses", default=None):
        import common

        config.pluginmanager.register(common)
