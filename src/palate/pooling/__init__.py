"""Making pools: sample and score candidates of many prompts, as a batch that can be restarted."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
