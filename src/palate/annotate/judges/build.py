"""Build an annotator from `--judge` and its options."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from palate.annotate.base import Annotator, judged, penalised, scored
from palate.annotate.judges.budget import Budget, Limits
from palate.annotate.judges.desk import Desk, JudgeModel
from palate.annotate.judges.judging import JUDGES, Bench, PairwiseJudge
from palate.annotate.judges.ledger import Ledger
from palate.annotate.judges.prices import price_of
from palate.annotate.judges.template import Template
from palate.annotate.registry import Registry
from palate.config import JudgeConfig
from palate.errors import ConfigError

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
        judge: the judge, which asks through the desk.
        template: the template of its questions.
    """

    annotate: Annotator
    judge: Any
    desk: Desk
    template: Template

    def metrics(self) -> dict[str, float]:
        """Return the counts since the last call and the total spending."""
        values: dict[str, float] = self.judge.bench.metrics()
        return values


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
    model = judge_model(context)
    limits = Limits(cfg.max_verdicts, cfg.max_judge_tokens, cfg.max_cost)
    desk = Desk(model, ledger, Budget(limits, ledger.spent()), say)
    bench = Bench(
        desk,
        template,
        criteria=cfg.criteria or "",
        samples=cfg.judge_samples,
        reasoning=cfg.judge_reasoning or (RUBRIC_TOKENS if mode == "rubric" else 0),
    )
    judge = JUDGES[mode](bench)
    annotate = judged(judge) if isinstance(judge, PairwiseJudge) else scored(judge, may_be_silent=True)
    return Judging(penalised(annotate, missing_eos=missing_eos_penalty), judge, desk, template)


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
