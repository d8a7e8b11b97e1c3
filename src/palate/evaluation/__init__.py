"""Measure models on held-out prompts, against each other or against answers in the data."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
