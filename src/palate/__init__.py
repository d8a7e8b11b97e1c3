"""Palate: direct alignment of language models from preferences.

`__init__.pyi` lists the public names; other names may change. Each public name loads its module on first use,
so `palate --help` does not wait for torch.
"""

import lazy_loader

from palate.spinning import bound_spinning

bound_spinning()

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
