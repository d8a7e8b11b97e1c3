"""Selection of pairs or smaller groups from groups of completions; dropped items are counted by reason."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
