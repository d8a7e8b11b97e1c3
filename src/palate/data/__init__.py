"""Data: read rows from files and the hub, make records of them, shuffle them, and write rows to files."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
