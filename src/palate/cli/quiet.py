"""Silence other libraries' progress bars and advice in the terminal."""

from __future__ import annotations

import logging
import warnings

from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """Silence transformers' progress bars and advice. Its errors are still raised."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # It warns about each retry; if all of them fail, it raises an error.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    # peft uses names that transformers will remove; a user of Palate can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
