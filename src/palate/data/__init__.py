"""Data: rows from files and from the hub, records from rows, an order to train in, and rows to files."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
