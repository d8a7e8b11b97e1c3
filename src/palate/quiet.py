"""Suppress the messages of other libraries."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

NOISY = ("huggingface_hub", "torch.utils.cpp_extension")
"""Loggers whose warnings help nobody: of retries, and of a CUDA toolkit without a GPU."""


def quiet_libraries() -> None:
    """Turn off transformers' progress bars and advice; its errors are still raised."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    # peft uses deprecated names of transformers, which a user of Palate cannot fix.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")


@contextmanager
def quieted() -> Iterator[None]:
    """Do the same in a `with` block: in a notebook, settings of other libraries belong to the user."""
    from transformers.utils import logging as transformers_logging

    levels = {name: logging.getLogger(name).level for name in NOISY}
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    with warnings.catch_warnings():
        quiet_libraries()
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()
