"""How groups of completions become pairs, or smaller groups, to learn from; what is left out is counted."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
