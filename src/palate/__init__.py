"""Palate: direct alignment of language models from preferences.

The names below are the public interface; what is not listed may change. They are loaded when first
used, so that `palate --help` need not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palate.annotate import (
        FunctionScorer,
        Ranker,
        RewardModel,
        against_first,
        annotator,
        judged,
        load_function,
        scored,
        scorer,
    )
    from palate.calibration import (
        RankingQuality,
        annotator_quality,
        expected_calibration_error,
        ranking_quality,
    )
    from palate.data import Stream, read_comparisons, read_demonstrations, read_prompts, write_rows
    from palate.errors import (
        AnnotatorError,
        ConfigError,
        DataError,
        ModelError,
        NonFiniteError,
        PalateError,
        RunError,
    )
    from palate.evaluate import Evaluation, compare, kl_from
    from palate.journal import Journal
    from palate.launch import Outcome, train
    from palate.learn import (
        Anchored,
        CachedReference,
        Learner,
        Likelihood,
        Pairwise,
        PairwiseCringe,
        Policy,
        RankedGroups,
        Ranking,
    )
    from palate.methods import METHODS, Method
    from palate.methods.click import ClickConfig
    from palate.methods.dpo import DPOConfig
    from palate.methods.ipo import IPOConfig
    from palate.methods.iterative_dpo import IterativeDPOConfig
    from palate.methods.oaif import OAIFConfig
    from palate.methods.pairwise_cringe import PairwiseCringeConfig
    from palate.methods.rest import ReSTConfig
    from palate.methods.reward_model import RewardModelConfig
    from palate.methods.rft import RFTConfig
    from palate.methods.rrhf import RRHFConfig
    from palate.methods.rso import RSOConfig
    from palate.methods.sft import SFTConfig
    from palate.methods.slic_hf import SlicHFConfig
    from palate.methods.spin import SPINConfig
    from palate.model import Codec, Snapshot, load_model
    from palate.report import write_report
    from palate.run import Display, Run
    from palate.select import (
        Drop,
        Selected,
        Thinned,
        above_threshold,
        all_pairs,
        best_vs_worst,
        by_likelihood_rank,
        distinct,
        first_round_pairs,
        pair_of_two,
        rejection_sample,
        select_completions,
        select_pairs,
        top_k,
        tournament_pairs,
    )
    from palate.statistics import Rate, rate_interval, wilson
    from palate.types import AnchoredPair, Comparison, Completion, Demonstration, Example, Group, Pair, Prompt

_HOME = {
    "annotate": (
        "FunctionScorer",
        "Ranker",
        "RewardModel",
        "against_first",
        "annotator",
        "judged",
        "load_function",
        "scored",
        "scorer",
    ),
    "calibration": ("RankingQuality", "annotator_quality", "expected_calibration_error", "ranking_quality"),
    "data": ("Stream", "read_comparisons", "read_demonstrations", "read_prompts", "write_rows"),
    "errors": (
        "AnnotatorError",
        "ConfigError",
        "DataError",
        "ModelError",
        "NonFiniteError",
        "PalateError",
        "RunError",
    ),
    "evaluate": ("Evaluation", "compare", "kl_from"),
    "journal": ("Journal",),
    "launch": ("Outcome", "train"),
    "learn": (
        "Anchored",
        "CachedReference",
        "Learner",
        "Likelihood",
        "Pairwise",
        "PairwiseCringe",
        "Policy",
        "RankedGroups",
        "Ranking",
    ),
    "methods": ("METHODS", "Method"),
    "methods.click": ("ClickConfig",),
    "methods.dpo": ("DPOConfig",),
    "methods.ipo": ("IPOConfig",),
    "methods.iterative_dpo": ("IterativeDPOConfig",),
    "methods.oaif": ("OAIFConfig",),
    "methods.pairwise_cringe": ("PairwiseCringeConfig",),
    "methods.rest": ("ReSTConfig",),
    "methods.reward_model": ("RewardModelConfig",),
    "methods.rft": ("RFTConfig",),
    "methods.rrhf": ("RRHFConfig",),
    "methods.rso": ("RSOConfig",),
    "methods.sft": ("SFTConfig",),
    "methods.slic_hf": ("SlicHFConfig",),
    "methods.spin": ("SPINConfig",),
    "model": ("Codec", "Snapshot", "load_model"),
    "report": ("write_report",),
    "run": ("Display", "Run"),
    "select": (
        "Drop",
        "Selected",
        "Thinned",
        "above_threshold",
        "all_pairs",
        "best_vs_worst",
        "by_likelihood_rank",
        "distinct",
        "first_round_pairs",
        "pair_of_two",
        "rejection_sample",
        "select_completions",
        "select_pairs",
        "top_k",
        "tournament_pairs",
    ),
    "statistics": ("Rate", "rate_interval", "wilson"),
    "types": (
        "AnchoredPair",
        "Comparison",
        "Completion",
        "Demonstration",
        "Example",
        "Group",
        "Pair",
        "Prompt",
    ),
}
_MODULE_OF = {name: f"palate.{module}" for module, names in _HOME.items() for name in names}

__all__ = [
    "METHODS",
    "Anchored",
    "AnchoredPair",
    "AnnotatorError",
    "CachedReference",
    "ClickConfig",
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
    "IterativeDPOConfig",
    "Journal",
    "Learner",
    "Likelihood",
    "Method",
    "ModelError",
    "NonFiniteError",
    "OAIFConfig",
    "Outcome",
    "Pair",
    "Pairwise",
    "PairwiseCringe",
    "PairwiseCringeConfig",
    "PalateError",
    "Policy",
    "Prompt",
    "RFTConfig",
    "RRHFConfig",
    "RSOConfig",
    "RankedGroups",
    "Ranker",
    "Ranking",
    "RankingQuality",
    "Rate",
    "ReSTConfig",
    "RewardModel",
    "RewardModelConfig",
    "Run",
    "RunError",
    "SFTConfig",
    "SPINConfig",
    "Selected",
    "SlicHFConfig",
    "Snapshot",
    "Stream",
    "Thinned",
    "above_threshold",
    "against_first",
    "all_pairs",
    "annotator",
    "annotator_quality",
    "best_vs_worst",
    "by_likelihood_rank",
    "compare",
    "distinct",
    "expected_calibration_error",
    "first_round_pairs",
    "judged",
    "kl_from",
    "load_function",
    "load_model",
    "pair_of_two",
    "ranking_quality",
    "rate_interval",
    "read_comparisons",
    "read_demonstrations",
    "read_prompts",
    "rejection_sample",
    "scored",
    "scorer",
    "select_completions",
    "select_pairs",
    "top_k",
    "tournament_pairs",
    "train",
    "wilson",
    "write_report",
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
