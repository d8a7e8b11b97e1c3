"""Other libraries' chatter, kept out of what a command shows."""

from __future__ import annotations

import logging
import warnings

from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """Keep transformers' progress bars and advice out of the way of ours; its errors are raised still."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # its retries; the error says that they failed
    # peft asks transformers for names that it will drop; nothing that a user of Palate can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
