"""Parse `--reward` values into an annotator."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from palate.annotate.base import Annotator, Scorer, judged, penalised, scored
from palate.annotate.function import Answers, Excuse, FunctionScorer, add_working_directory, load_function
from palate.annotate.identity import code_key
from palate.annotate.judges.local import weights_digest
from palate.annotate.ranker import Ranker, against_first
from palate.annotate.registry import Registry
from palate.annotate.reward_model import RewardModel
from palate.annotate.rules import length, regex, sentiment
from palate.annotate.topic import OnTopic
from palate.errors import AnnotatorError
from palate.given import GivenReward, is_judge
from palate.memory import key_of
from palate.model.loaded import Head
from palate.model.source import model_key
from palate.near import near

_RANKER = "ranker:"
_HEADS: dict[str, Head] = {"model": "scalar", "ranker": "lm"}
"""The head of the models of rewards, by the word before the colon."""
_WEIGHT = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*\*\s*(.+)", re.DOTALL)


def annotator(
    specs: Sequence[str],
    *,
    missing_eos_penalty: float = 0.0,
    kept: Answers | None = None,
    say: Callable[[str], None] = lambda text: None,
    excuse: Excuse | None = None,
    **model_options: Any,
) -> Annotator:
    """Return the annotator for `--reward` values such as `sentiment` and `0.5*length:40`.

    Args:
        specs: one per reward, each with an optional weight in front; or rewards given in Python.
        missing_eos_penalty: subtracted from the reward of truncated completions.
        kept: saves functions' rewards as they arrive, so that a failure loses none of them.
        say: reports temporary failures, and rewards that abstain from a prompt, to the user.
        excuse: receives rows for which a function fails; they get no reward. None raises an error. With it, a
            call may be without any usable reward.
        model_options: passed to `RewardModel.load`.

    Raises:
        AnnotatorError: a spec is not a known reward.
    """
    weights, scorers = [], []
    for spec in specs:
        weight, name = _split(spec)
        if is_judge(name):
            return penalised(_compared(specs, **model_options), missing_eos=missing_eos_penalty)
        if not math.isfinite(weight):
            raise AnnotatorError(f"reward {spec!r} has the weight {weight}; expected a finite number")
        weights.append(weight)
        scorers.append(scorer(name, **model_options))
    _tell_apart([single for single in scorers if isinstance(single, FunctionScorer)])
    for single in scorers:
        if isinstance(single, FunctionScorer):
            single.kept, single.say, single.excuse = kept, say, excuse
    summed = scored(*scorers, weights=weights, may_be_silent=excuse is not None, say=say)
    return penalised(summed, missing_eos=missing_eos_penalty)


def _tell_apart(functions: Sequence[FunctionScorer]) -> None:
    """Number functions that share a name, such as lambdas, so that they share no saved rewards."""
    by_name: dict[str, list[object]] = {}
    for single in functions:
        alike = by_name.setdefault(single.name, [])
        if single.function not in alike:
            alike.append(single.function)
        if (number := alike.index(single.function)) > 0:
            single.saved_as = f"{single.name} ({number + 1})"


def files_of(specs: Sequence[str]) -> list[Path]:
    """Return the Python files among the `--reward` values."""
    files = [Path(_split(spec)[1].rpartition(":")[0]) for spec in specs]
    return [path for path in files if path.suffix == ".py" and path.is_file()]


def identities_of(specs: Sequence[str]) -> dict[str, str]:
    """Return a key of the code or of the model of each `--reward` value, by its name without the weight.

    A Python file counts by its whole text, under the name of the file. Rules and rewards of other packages
    have no key.

    Raises:
        AnnotatorError: a spec is not a known reward, or a function cannot be loaded.
        ModelError: a model does not exist.
    """
    keys = {path.name: key_of(path.read_text("utf-8")) for path in files_of(specs)}
    for _, name in map(_split, specs):
        kind, colon, argument = name.partition(":")
        if isinstance(name, GivenReward):
            own = name.reward.model if isinstance(name.reward, RewardModel) else None
            keys[str(name)] = code_key(name.reward) if own is None else weights_digest(own)
        elif colon and kind in _HEADS:
            keys[name] = model_key(argument, _HEADS[kind])
        elif colon and kind not in REWARDS and not files_of([name]):
            single = scorer(name)
            assert isinstance(single, FunctionScorer), name
            keys[name] = code_key(single.function)
    return keys


def scorer(spec: str, **model_options: Any) -> Scorer:
    """Return the scorer for one spec, without weight.

    Raises:
        AnnotatorError: the spec is not a known reward.
    """
    if isinstance(spec, GivenReward):
        return FunctionScorer(spec.reward) if spec.kind == "function" else spec.reward
    kind, colon, argument = spec.partition(":")
    if kind in REWARDS:
        made: Scorer = REWARDS[kind](argument if colon else None, **model_options)
        return made
    if colon and kind and (_meant(kind) is None or _is_module(kind)):
        return load_function(spec)
    raise unknown(spec)


def _meant(kind: str) -> str | None:
    """Return the kind of reward that is closest to a mistyped one; None if none is close."""
    kinds = [*REWARDS, _RANKER.removesuffix(":")]
    return None if kind in kinds else near(kind, kinds)


def _is_module(name: str) -> bool:
    """Return True for a file, for a module in a package and for a module that can be imported."""
    if not name.isidentifier():
        return True
    add_working_directory()
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except ValueError:
        return True


def unknown(spec: str) -> AnnotatorError:
    """Return the error for an unknown spec, with the kind of reward that is probably meant."""
    kind, colon, argument = _split(spec)[1].strip().partition(":")
    meant = _meant(kind)
    advice = f"; did you mean `{meant}{colon}{argument}`?" if meant is not None else ""
    others = "".join(f", {kind}" for kind in REWARDS if kind not in _OWN)
    return AnnotatorError(
        f"reward {spec!r} is unknown; expected sentiment, on-topic, length:WORDS, regex:PATTERN, "
        f"module:function, file.py:function, model:ID{others} or ranker:ID{advice}"
    )


def _sentiment(argument: str | None, **_: Any) -> Scorer:
    if argument is not None:
        raise unknown(f"sentiment:{argument}")
    return sentiment()


def _on_topic(argument: str | None, **_: Any) -> Scorer:
    if argument is not None:
        raise unknown(f"on-topic:{argument}")
    return OnTopic()


def _length(argument: str | None, **_: Any) -> Scorer:
    if argument is None:
        raise unknown("length")
    if not argument.isdecimal():
        raise AnnotatorError(
            f"reward {f'length:{argument}'!r} is not a length rule; expected length:WORDS, such as length:40"
        )
    return length(int(argument))


def _regex(argument: str | None, **_: Any) -> Scorer:
    if argument is None:
        raise unknown("regex")
    return regex(argument)


def _model(argument: str | None, **model_options: Any) -> Scorer:
    if argument is None:
        raise unknown("model")
    return RewardModel.load(argument, **model_options)


_OWN = {"sentiment": _sentiment, "on-topic": _on_topic, "length": _length, "regex": _regex, "model": _model}

REWARDS = Registry("palate.rewards", _OWN)
"""Makers of scorers, by the word before the colon of a spec."""


def _split(spec: str) -> tuple[float, str]:
    """Return the weight and the reward."""
    if isinstance(spec, GivenReward):
        return spec.weight, spec
    match = _WEIGHT.fullmatch(spec)
    return (float(match[1]), match[2]) if match else (1.0, spec)


def _compared(specs: Sequence[str], **model_options: Any) -> Annotator:
    """Return the annotator for a ranker or a judge, whose comparisons cannot be added to other rewards."""
    weight, name = next(part for part in map(_split, specs) if is_judge(part[1]))
    if len(specs) > 1 or weight != 1.0:
        who, alone = ("judge", "") if isinstance(name, GivenReward) else ("ranker", ", as ranker:ID")
        raise AnnotatorError(
            f"rewards {', '.join(map(repr, specs))} have a {who}, which compares completions and gives "
            f"no scores that could be weighted; expected it alone and without a weight{alone}"
        )
    if isinstance(name, GivenReward):
        # A ranker gets the same annotator as `ranker:ID`, so both give the same rewards.
        return (against_first if isinstance(name.reward, Ranker) else judged)(name.reward)
    return against_first(Ranker.load(name.removeprefix(_RANKER), **model_options))
