"""Palate: direct alignment of language models from preferences.

The names below are the public interface; what is not listed may change. They are loaded when first
used, so that `palate --help` need not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palate.annotate import FunctionScorer, annotator, judged, load_function, scored, scorer
    from palate.data import Stream, read_comparisons, read_demonstrations, read_prompts, write_rows
    from palate.errors import AnnotatorError, ConfigError, DataError, ModelError, PalateError, RunError
    from palate.evaluate import Evaluation, compare, wilson
    from palate.launch import Outcome, train
    from palate.learn import Learner, Pairwise, Policy
    from palate.methods import METHODS, Method
    from palate.methods.dpo import DPOConfig
    from palate.methods.ipo import IPOConfig
    from palate.methods.oaif import OAIFConfig
    from palate.model import Codec, Snapshot, load_model
    from palate.run import Display, Run
    from palate.select import Drop, best_vs_worst, pair_of_two, select_pairs
    from palate.types import Comparison, Completion, Demonstration, Example, Group, Pair, Prompt

_HOME = {
    "annotate": ("FunctionScorer", "annotator", "judged", "load_function", "scored", "scorer"),
    "data": ("Stream", "read_comparisons", "read_demonstrations", "read_prompts", "write_rows"),
    "errors": ("AnnotatorError", "ConfigError", "DataError", "ModelError", "PalateError", "RunError"),
    "evaluate": ("Evaluation", "compare", "wilson"),
    "launch": ("Outcome", "train"),
    "learn": ("Learner", "Pairwise", "Policy"),
    "methods": ("METHODS", "Method"),
    "methods.dpo": ("DPOConfig",),
    "methods.ipo": ("IPOConfig",),
    "methods.oaif": ("OAIFConfig",),
    "model": ("Codec", "Snapshot", "load_model"),
    "run": ("Display", "Run"),
    "select": ("Drop", "best_vs_worst", "pair_of_two", "select_pairs"),
    "types": ("Comparison", "Completion", "Demonstration", "Example", "Group", "Pair", "Prompt"),
}
_MODULE_OF = {name: f"palate.{module}" for module, names in _HOME.items() for name in names}

__all__ = [
    "METHODS",
    "AnnotatorError",
    "Codec",
    "Comparison",
    "Completion",
    "ConfigError",
    "DPOConfig",
    "DataError",
    "Demonstration",
    "Display",
    "Drop",
    "Evaluation",
    "Example",
    "FunctionScorer",
    "Group",
    "IPOConfig",
    "Learner",
    "Method",
    "ModelError",
    "OAIFConfig",
    "Outcome",
    "Pair",
    "Pairwise",
    "PalateError",
    "Policy",
    "Prompt",
    "Run",
    "RunError",
    "Snapshot",
    "Stream",
    "annotator",
    "best_vs_worst",
    "compare",
    "judged",
    "load_function",
    "load_model",
    "pair_of_two",
    "read_comparisons",
    "read_demonstrations",
    "read_prompts",
    "scored",
    "scorer",
    "select_pairs",
    "train",
    "wilson",
    "write_rows",
]


def __getattr__(name: str) -> Any:
    """Load a public name from where it lives."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'palate' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
