"""Build an annotator from `--judge` and its options."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from palate.annotate.base import Annotator, Judge, judged, penalised, scored
from palate.annotate.judges.budget import Budget, Limits
from palate.annotate.judges.desk import Desk, JudgeModel
from palate.annotate.judges.judging import JUDGES, Bench, PairwiseJudge, metrics_of
from palate.annotate.judges.ledger import Ledger
from palate.annotate.judges.prices import FREE, price_of
from palate.annotate.judges.records import POINTS, SCORES, Amount, Question, labels_of
from palate.annotate.judges.several import Cascade, Panel, ScorePanel
from palate.annotate.judges.template import Mode, Template
from palate.annotate.registry import Registry
from palate.config import JudgeConfig
from palate.errors import ConfigError
from palate.types import Group

if TYPE_CHECKING:
    from palate.annotate.judges.local import LocalModel

RUBRIC_TOKENS = 256
"""Tokens for a grading, which explains itself in at most 100 words, unless `judge_reasoning` sets them."""


@dataclass(frozen=True)
class JudgeContext:
    """The options of a run that a judge may need.

    Attributes:
        cfg: the judge's options.
        model_options: device, dtype and the like, for a local judge.
        own: returns the policy as a judge, for `self`; None if no policy is trained.
    """

    cfg: JudgeConfig
    model_options: Mapping[str, Any] = field(default_factory=dict)
    own: Callable[[], LocalModel] | None = None


@dataclass(frozen=True)
class Judging:
    """A judge with its annotator.

    Attributes:
        annotate: groups in, groups with rewards out.
        judge: the judge, which compares or scores; several judges are one.
        benches: the bench of each model that is asked. They share one budget and one ledger.
        template: the template of its questions.
    """

    annotate: Annotator
    judge: Any
    benches: Sequence[Bench]
    template: Template

    @property
    def compares(self) -> bool:
        """True for a judge that compares two completions."""
        return self.template.mode == "pairwise"

    @property
    def remote(self) -> bool:
        """True if all models compute elsewhere, so that this process can do other work meanwhile."""
        return all(getattr(bench.desk.model, "remote", False) for bench in self.benches)

    def metrics(self) -> dict[str, float]:
        """Return the counts since the last call and the total spending."""
        return metrics_of(self.benches)

    def questions(self, group: Group) -> list[Question]:
        """Return the questions about a group's completions: each two in both orders, or each one."""
        bench, prompt = self.benches[0], group.prompt
        texts = [completion.text for completion in group.completions]
        if self.compares:
            return [
                bench.question(prompt, two, labels_of(prompt.content, two)) for two in permutations(texts, 2)
            ]
        labels = SCORES if self.template.mode == "score" else POINTS
        return [bench.question(prompt, (text,), labels) for text in texts]

    def expected(self, questions: Sequence[Question], cfg: JudgeConfig) -> tuple[int, Amount]:
        """Return the largest likely number of verdicts on questions, and their cost, if all models are asked.

        A token has about four bytes; three are assumed here.
        """
        sampled = self.template.mode == "rubric" or not cfg.judge_logprobs
        repeats = cfg.judge_samples if sampled else 1
        count, amount = 0, Amount()
        for bench in self.benches:
            price = getattr(bench.desk.model, "price", FREE)
            for question in questions:
                length = len(question.render(cfg.judge_max_text).encode()) // 3
                written = max(cfg.judge_max_tokens, question.reasoning)
                count += repeats
                amount += price.amount(repeats * length, repeats * written)
        return count, amount

    def amounts(self, questions: Sequence[Question]) -> list[tuple[int, Amount]]:
        """Return the number of saved verdicts on each question, and their cost, summed over the models."""
        by_model = [bench.amounts(questions) for bench in self.benches]
        return [
            (sum(count for count, _ in own), sum((amount for _, amount in own), Amount()))
            for own in zip(*by_model, strict=True)
        ]


def judging(
    context: JudgeContext,
    *,
    ledger: Ledger,
    say: Callable[[str], None] = lambda text: None,
    one_completion: bool = False,
    missing_eos_penalty: float = 0.0,
) -> Judging:
    """Return the judge that a configuration names, with its verdicts in a ledger.

    Args:
        context: the judge's options and the run's.
        ledger: the run's ledger; earlier spending in it counts.
        say: shows a message to the user.
        one_completion: the method has one completion per prompt, so there is nothing to compare.
        missing_eos_penalty: subtracted from the reward of truncated completions.

    Raises:
        ConfigError: the judge or one of its options cannot be used.
        AnnotatorError, ModelError: its template or model cannot be loaded.
    """
    cfg = context.cfg
    mode = cfg.judge_mode or ("score" if one_completion else "pairwise")
    if mode == "pairwise" and one_completion:
        raise ConfigError(
            "--judge-mode pairwise compares completions of a prompt, but there is only one per prompt; use "
            "score or rubric"
        )
    template = Template.load(mode, cfg.judge_template)
    if cfg.judge_expert is not None and mode != "pairwise":
        raise ConfigError(
            f"judge_expert is {cfg.judge_expert!r} with --judge-mode {mode}; a second judge for unsure pairs "
            "needs --judge-mode pairwise"
        )
    experts = () if cfg.judge_expert is None else (cfg.judge_expert,)
    models = [judge_model(context), *(_further(spec, context) for spec in (*cfg.judge_panel, *experts))]
    budget = Budget(Limits(cfg.max_verdicts, cfg.max_judge_tokens, cfg.max_cost), ledger.spent())
    benches = [
        Bench(
            Desk(model, ledger, budget, say),
            template,
            criteria=cfg.criteria or "",
            samples=cfg.judge_samples,
            reasoning=cfg.judge_reasoning or (RUBRIC_TOKENS if mode == "rubric" else 0),
            logprobs=cfg.judge_logprobs,
        )
        for model in models
    ]
    judge, annotate = _annotating(mode, benches, cfg)
    return Judging(penalised(annotate, missing_eos=missing_eos_penalty), judge, benches, template)


def _annotating(mode: Mode, benches: Sequence[Bench], cfg: JudgeConfig) -> tuple[Any, Annotator]:
    """Return the judge over all models, and its annotator."""
    if mode != "pairwise":
        scorers: list[Any] = [JUDGES[mode](bench) for bench in benches]
        scorer = scorers[0] if len(scorers) == 1 else ScorePanel(scorers)
        return scorer, scored(scorer, may_be_silent=True)
    members = [PairwiseJudge(bench) for bench in benches]
    expert = None if cfg.judge_expert is None else members.pop()
    judge: Judge = members[0] if len(members) == 1 else Panel(members)
    if expert is not None:
        judge = Cascade(judge, expert, unsure=cfg.judge_unsure)
    return judge, judged(judge)


def _further(spec: str, context: JudgeContext) -> JudgeModel:
    """Return the model of another judge than the first.

    Raises:
        ConfigError: it needs a key of its own. The first judge's key must not reach another host.
    """
    cfg = context.cfg
    env = cfg.judge_key_env
    if spec.startswith("server:"):
        host, first = (_host(one) for one in (spec, cfg.judge or ""))
        env = cfg.judge_keys.get(host, env if host == first else "")
        if not env and "@https:" in spec.lower():
            raise ConfigError(
                f"the judge at {host} needs a key, and the key of another host is not sent there; name the "
                f"environment variable with its key: --judge-keys {host}=NAME"
            )
    own = cfg.model_copy(update={"judge": spec, "judge_key_env": env})
    return judge_model(replace(context, cfg=own))


def _host(spec: str) -> str:
    return urlsplit(spec[spec.find("@http") + 1 :]).netloc


def judge_model(context: JudgeContext) -> JudgeModel:
    """Return the model that `--judge` names.

    Raises:
        ConfigError: the name is unknown.
    """
    spec = context.cfg.judge
    assert spec is not None, "there is a judge"
    kind, colon, argument = spec.partition(":")
    if spec == "human":
        raise ConfigError(
            "judge 'human' cannot be asked during a run; give a model: local:MODEL, server:MODEL@URL or self"
        )
    if spec == "self" or (colon and argument and kind != "self" and kind in MODELS):
        return MODELS[kind](argument, context)  # type: ignore[no-any-return]
    raise ConfigError(
        f"judge {spec!r} is unknown; expected local:MODEL (a hub id, a directory, or that of a run), "
        f"server:MODEL@URL{_others()} or self"
    )


def _server(argument: str, context: JudgeContext) -> JudgeModel:
    cfg = context.cfg
    try:
        server = importlib.import_module("palate.annotate.judges.server")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"a judge on a server needs the package {error.name}: run `pip install 'palate[judge]'`"
        ) from error
    model, url = server.address(argument)
    price = price_of(model, url, cfg.price_in, cfg.price_out, needed=cfg.max_cost is not None)
    options = server.ServerOptions(
        longest=cfg.judge_max_text,
        max_tokens=cfg.judge_max_tokens,
        temperature=cfg.judge_temperature,
        mass=cfg.judge_label_mass,
        logprobs=cfg.judge_logprobs,
        at_once=cfg.judge_concurrency,
        requests_per_minute=cfg.judge_requests_per_minute,
        tokens_per_minute=cfg.judge_tokens_per_minute,
        timeout=cfg.judge_timeout,
        retries=cfg.judge_retries,
        max_wait=cfg.judge_max_wait,
    )
    key = server.key_from(cfg.judge_key_env, url)
    judge: JudgeModel = server.ServerModel(model, url, key=key, price=price, options=options)
    return judge


def _local(argument: str, context: JudgeContext) -> JudgeModel:
    from palate.annotate.judges.local import LocalModel

    return LocalModel.load(argument, model_options=context.model_options, **local_options(context.cfg))


def _self(argument: str, context: JudgeContext) -> JudgeModel:
    if context.own is None:
        raise ConfigError(
            "judge 'self' is the policy in training, but this method trains no policy; name another judge"
        )
    return context.own()


def local_options(cfg: JudgeConfig) -> dict[str, Any]:
    """Return a local model's options."""
    return {
        "max_tokens": cfg.judge_max_tokens,
        "temperature": cfg.judge_temperature,
        "mass": cfg.judge_label_mass,
        "longest": cfg.judge_max_text,
    }


MODELS = Registry("palate.judges", {"local": _local, "server": _server, "self": _self})


def _others() -> str:
    return "".join(f", {kind}:..." for kind in MODELS if kind not in ("local", "server", "self"))
