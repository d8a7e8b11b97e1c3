"""Losses: pure functions of tensors and floats that return one number per example, unreduced."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
