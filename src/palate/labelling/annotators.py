"""Annotators over data: the labels of rows, with both orders of a judge's verdicts and their cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from palate.annotate import Annotator, annotator, files_of, judged, penalised, with_label_noise
from palate.annotate.base import Judge
from palate.annotate.judges.build import JudgeContext, Judging, judging
from palate.annotate.judges.ledger import Ledger
from palate.annotate.judges.records import Amount
from palate.config import RewardConfig
from palate.errors import AnnotatorError
from palate.given import is_judge
from palate.journal import Journal, key_of
from palate.run.annotating import journaled
from palate.run.facts import require_same
from palate.types import Completion, Group, Prompt


@dataclass(frozen=True)
class Labels:
    """The labels of a group.

    Attributes:
        rewards: one per completion; None without a usable one.
        shown: P(i preferred to j), by (i, j, first shown), for a judge that compares.
        verdicts: the judge's verdicts on the group.
        amount: their cost.
    """

    rewards: tuple[float | None, ...]
    shown: Mapping[tuple[int, int, int], float | None]
    verdicts: int = 0
    amount: Amount = field(default_factory=Amount)


class Labeller(Protocol):
    """Labels groups. `name` is the name of the annotator, `compares` whether it compares completions."""

    name: str
    compares: bool

    def __call__(self, groups: Sequence[Group]) -> list[Labels]:
        """Return the labels of each group."""

    def metrics(self) -> dict[str, float]:
        """Return the judge's counts since the last call, and its total spending."""


class JudgeLabeller:
    """Labels by a judge. Its verdicts are in the ledger, so a verdict is asked for once."""

    def __init__(self, court: Judging, cfg: RewardConfig, *, name: str, seed: int) -> None:
        self.name, self.compares = name, court.compares
        self._court, self.metrics = court, court.metrics
        self._heard = _Heard(court.judge) if court.compares else None
        annotate = court.annotate
        if self._heard is not None:
            annotate = penalised(judged(self._heard), missing_eos=cfg.missing_eos_penalty or 0.0)
        self._annotate = with_label_noise(annotate, cfg.label_noise, seed=seed)
        self._noisy = cfg.label_noise > 0  # then the labels are not those of the verdicts

    def __call__(self, groups: Sequence[Group]) -> list[Labels]:
        """Return the labels of each group."""
        annotated = self._annotate(groups)
        questions = [self._court.questions(group) for group in groups]
        amounts = iter(self._court.amounts([question for own in questions for question in own]))
        labels = []
        for group, own in zip(annotated, questions, strict=True):
            assert group.rewards is not None
            costs = [next(amounts) for _ in own]
            count, amount = sum(count for count, _ in costs), sum((cost for _, cost in costs), Amount())
            labels.append(Labels(group.rewards, self._shown(group), count, amount))
        return labels

    def _shown(self, group: Group) -> dict[tuple[int, int, int], float | None]:
        if self._heard is None or self._noisy:
            return {}
        n = range(len(group.completions))
        shown: dict[tuple[int, int, int], float | None] = {}
        for i, j in ((i, j) for i in n for j in n if i != j):
            p = self._heard.verdict(group.prompt, group.completions[i], group.completions[j])
            shown[i, j, i], shown[j, i, i] = p, None if p is None else 1.0 - p
        return shown


class RewardLabeller:
    """Labels by rewards. The journal stores them, so that none is computed twice."""

    def __init__(self, annotate: Annotator, *, name: str, compares: bool) -> None:
        self.name, self.compares, self._annotate = name, compares, annotate

    def __call__(self, groups: Sequence[Group]) -> list[Labels]:
        """Return the labels of each group."""
        return [Labels(group.rewards or (), {}) for group in self._annotate(groups)]

    def metrics(self) -> dict[str, float]:
        """Return nothing: rewards have no cost that Palate knows of."""
        return {}


class _Heard:
    """A judge that remembers its verdicts."""

    def __init__(self, judge: Judge) -> None:
        self.name, self._judge = judge.name, judge
        self._verdicts: dict[tuple[str, str, str], float | None] = {}

    def __call__(
        self, prompts: Sequence[Prompt], pairs: Sequence[tuple[Completion, Completion]]
    ) -> list[float | None]:
        verdicts = self._judge(prompts, pairs)
        self._verdicts = {
            (prompt.id, first.text, second.text): p
            for prompt, (first, second), p in zip(prompts, pairs, verdicts, strict=True)
        }
        return verdicts

    def verdict(self, prompt: Prompt, first: Completion, second: Completion) -> float | None:
        return self._verdicts[prompt.id, first.text, second.text]


def labeller(
    cfg: RewardConfig,
    options: Mapping[str, Any],
    *,
    seed: int,
    ledger: Ledger,
    journal: Journal,
    output: Path,
    one_completion: bool,
    say: Callable[[str], None],
) -> Labeller:
    """Return the labeller that a configuration names.

    Args:
        cfg: the judge or the rewards.
        options: options of models: device and the like.
        seed: seed of the label noise.
        ledger: the ledger of verdicts, and of the rewards of functions.
        journal: the journal of rewards.
        output: the file of the labels, for messages.
        one_completion: no prompt has two completions to compare.
        say: shows a message to the user.

    Raises:
        AnnotatorError, ConfigError, ModelError: the judge or a reward cannot be used, or none is named.
        RunError: the rewards changed since the file was begun.
    """
    if cfg.judge is not None:
        court = judging(
            JudgeContext(cfg, options),
            ledger=ledger,
            say=say,
            one_completion=one_completion,
            missing_eos_penalty=cfg.missing_eos_penalty or 0.0,
        )
        spec = " + ".join((cfg.judge, *cfg.judge_panel))
        name = spec if cfg.judge_expert is None else f"{spec}, if unsure {cfg.judge_expert}"
        return JudgeLabeller(court, cfg, name=name, seed=seed)
    if not cfg.reward:
        raise AnnotatorError(
            "no annotator is given; name a judge, such as --judge local:MODEL, or a reward, such as "
            "--reward sentiment"
        )
    files = {str(path): path.read_text("utf-8") for path in files_of(cfg.reward)}
    identity = key_of([*cfg.reward], files, cfg.missing_eos_penalty)
    penalty = cfg.missing_eos_penalty or 0.0
    annotate = annotator(cfg.reward, missing_eos_penalty=penalty, kept=ledger, say=say, **options)
    # After the rewards are loaded, so that a misspelt one leaves no trace that would refuse the right one.
    require_same(
        journal,
        output,
        "the rewards",
        identity,
        "the rewards or the code of a reward",
        otherwise=f"delete {journal.path} to start over, or use another --output",
    )
    kept = journaled(annotate, journal, name=identity, start=_nothing, observe=_nothing, say=say)
    noisy = with_label_noise(kept, cfg.label_noise, seed=seed)
    compares = cfg.label_noise > 0 or any(map(is_judge, cfg.reward))
    return RewardLabeller(noisy, name=" + ".join(cfg.reward), compares=compares)


def _nothing(*_: object) -> None:
    pass
