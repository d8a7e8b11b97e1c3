from __future__ import annotations

import logging
import warnings

import pytest
from transformers.utils import logging as transformers_logging

from palate.quiet import quieted


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")  # the tests' environment switches them off
def test_other_libraries_get_their_settings_back() -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_info()
    transformers_logging.enable_progress_bar()
    hub, filters = logging.getLogger("huggingface_hub").level, list(warnings.filters)
    try:
        with quieted():
            assert not transformers_logging.is_progress_bar_enabled()
            assert transformers_logging.get_verbosity() == logging.ERROR
        assert transformers_logging.is_progress_bar_enabled()
        assert transformers_logging.get_verbosity() == logging.INFO
        assert (logging.getLogger("huggingface_hub").level, list(warnings.filters)) == (hub, filters)
    finally:
        transformers_logging.set_verbosity(before[0])
        if not before[1]:
            transformers_logging.disable_progress_bar()
