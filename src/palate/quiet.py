"""Other libraries' chatter, kept out of what a command shows."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def quiet_libraries() -> None:
    """Keep transformers' progress bars and advice out of the way of ours; its errors are raised still."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # its retries; the error says that they failed
    # peft asks transformers for names that it will drop; nothing that a user of Palate can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")


@contextmanager
def quieted() -> Iterator[None]:
    """Do the same for a while: in a notebook, the settings of other libraries are the user's own."""
    from transformers.utils import logging as transformers_logging

    hub = logging.getLogger("huggingface_hub")
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    level = hub.level
    with warnings.catch_warnings():
        quiet_libraries()
        try:
            yield
        finally:
            hub.setLevel(level)
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()
