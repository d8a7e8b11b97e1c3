"""A judge in this process: any causal language model, by its label probabilities or its written text."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import torch

from palate.annotate.judges.desk import Desk
from palate.annotate.judges.prices import FREE
from palate.annotate.judges.reading import MASS, Reading, read_points, read_text
from palate.annotate.judges.records import Amount, Question, Verdict, closing
from palate.config import ModelConfig, Sampling
from palate.errors import BudgetError, DataError
from palate.model import Codec, LoadedModel, Snapshot, load_model
from palate.types import Completion, Content, Group, Prompt

TOGETHER = 96
"""Number of questions between two writes to the ledger; their answers are sampled together."""

OPENING = "\n\nAnswer:\n"
"""The text after the question if no chat template opens the model's turn."""


class Kind(NamedTuple):
    """Options that texts which are sampled together share: their most tokens, temperature and seed."""

    limit: int
    temperature: float
    seed: int


class Draw(NamedTuple):
    """A text to sample, and its index among the samples of its prompt."""

    kind: Kind
    number: int


class LocalModel:
    """Asks a causal language model in this process.

    Its codec never reads a text's characters as control tokens, so nothing in a completion can end the turn
    that contains it. Texts that do not fit the model's context are truncated at their ends.

    Args:
        snapshot: returns the model to ask, which may change between calls.
        codec: returns the codec of the model.
        name: the name in messages.
        identity: returns everything that distinguishes the model from others, for keys.
        max_tokens: the most tokens for a verdict in text.
        temperature: the temperature of a verdict in text.
        mass: the lowest total probability of the labels for a usable verdict.
        longest: the most characters shown of each text.
    """

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        codec: Callable[[], Codec],
        *,
        name: str,
        identity: Callable[[], Mapping[str, Any]],
        max_tokens: int = 16,
        temperature: float = 1.0,
        mass: float = MASS,
        longest: int = 8000,
    ) -> None:
        self.name, self._snapshot, self._get_codec = name, snapshot, codec
        self._identity = identity
        self._options = {"max_tokens": max_tokens, "mass": mass, "longest": longest}
        if temperature != 1.0:
            self._options["temperature"] = temperature
        self._max_tokens, self._mass, self._longest = max_tokens, mass, longest
        self._temperature = temperature

    @classmethod
    def load(cls, name: str, *, model_options: Mapping[str, Any], **options: Any) -> LocalModel:
        """Load a judge from a hub id, a model's directory or a run's directory.

        Raises:
            ModelError: it cannot be loaded, or cannot generate text.
        """
        cfg = ModelConfig.model_validate({"model": name, "lora": False, **model_options})
        model = load_model(cfg, trainable=False)
        snapshot = Snapshot(0, lambda: nullcontext(model), micro_batch_tokens=8192, name=f"judge:{name}")
        identity = {"model": name, "weights": weights_digest(model)}
        return cls(
            lambda: snapshot, lambda: model.codec, name=f"local:{name}", identity=lambda: identity, **options
        )

    @property
    def _codec(self) -> Codec:
        return self._get_codec()

    @property
    def identity(self) -> Mapping[str, Any]:
        """Return everything besides the question that an answer depends on."""
        return {**self._identity(), **self._options}

    def ask(self, questions: Mapping[str, Question], desk: Desk) -> None:
        """Answer questions; see `JudgeModel.ask`."""
        waiting = iter(questions.items())
        while part := list(islice(waiting, TOGETHER)):
            self._ask(part, desk)

    def _ask(self, part: Sequence[tuple[str, Question]], desk: Desk) -> None:
        started = time.perf_counter()
        prompts = [self.prompt_of(question) for _, question in part]
        taken, exhausted = self._reserved(part, prompts, desk)
        part, prompts = part[: len(taken)], prompts[: len(taken)]
        requests = [desk.ledger.sent(key, amount) for (key, _), amount in zip(part, taken, strict=True)]
        verdicts = self._verdicts([question for _, question in part], prompts)
        each = round(1000 * (time.perf_counter() - started) / max(1, len(part)))
        for (key, question), request, prompt, (reading, raw, written) in zip(
            part, requests, prompts, verdicts, strict=True
        ):
            read = len(self._codec.prompt_ids(prompt))
            amount = Amount(read + written)
            verdict = Verdict(
                *(reading.status, reading.probabilities, reading.label_mass, reading.argmax_is_label),
                raw=raw,
                note=reading.note,
                prompt_tokens=read,
                completion_tokens=written,
                price_source=FREE.source,
                served_model=self._codec.name,
                latency_ms=each,
                changed=question.changed,
                cuts=question.cuts(self._longest),
            )
            desk.ledger.done(request, amount, question, key, self.name, verdict)
        for worst in taken:
            desk.budget.settle_now(worst, worst)
        if exhausted is not None:
            raise exhausted

    def _reserved(
        self, part: Sequence[tuple[str, Question]], prompts: Sequence[Prompt], desk: Desk
    ) -> tuple[list[Amount], BudgetError | None]:
        """Reserve the cost of the first questions, as many as the limits allow."""
        taken: list[Amount] = []
        for (key, question), prompt in zip(part, prompts, strict=True):
            worst = Amount(len(self._codec.prompt_ids(prompt)) + self._written(question))
            try:
                desk.budget.take(worst, new=not desk.ledger.was_sent(key))
            except BudgetError as error:
                return taken, error
            taken.append(worst)
        return taken, None

    def _written(self, question: Question) -> int:
        """Return the most tokens that the model may write, reasoning included."""
        if question.wants_logprobs:
            return question.reasoning + 1
        if question.template.mode == "rubric":
            return self._longest_answer(question)
        return question.reasoning + self._longest_answer(question)

    def _longest_answer(self, question: Question) -> int:
        """Return the most tokens of an answer in text; a rubric's answer contains its reasoning."""
        rubric = question.template.mode == "rubric"
        return max(self._max_tokens, question.reasoning) if rubric else self._max_tokens

    def _verdicts(
        self, questions: Sequence[Question], prompts: Sequence[Prompt]
    ) -> list[tuple[Reading, str, int]]:
        """Return the reading, text and number of written tokens of each question."""
        if not questions:
            return []
        thoughts = self._think(questions, prompts)
        final_prompts = [
            prompt if thought is None else self._second(prompt, thought.text, question)
            for question, prompt, thought in zip(questions, prompts, thoughts, strict=True)
        ]
        answers = self._write(questions, final_prompts)
        by_label = [i for i, question in enumerate(questions) if question.wants_logprobs]
        by_logps = self._labels([questions[i] for i in by_label], [final_prompts[i] for i in by_label])
        readings = dict(zip(by_label, by_logps, strict=True))
        verdicts = []
        for i, (question, thought, answer) in enumerate(zip(questions, thoughts, answers, strict=True)):
            written = [part for part in (thought, answer) if part is not None]
            reading = readings[i] if answer is None else _read(question, answer)
            tokens = sum(len(part.token_ids) for part in written) + (answer is None)
            verdicts.append((reading, "\n\n".join(part.text for part in written), tokens))
        return verdicts

    def _think(self, questions: Sequence[Question], prompts: Sequence[Prompt]) -> list[Completion | None]:
        """Sample the reasoning before each verdict; None if there is none, or if it is part of the answer."""
        wanted = [
            self._draw(q, q.reasoning, 0.0) if q.reasoning and q.template.mode != "rubric" else None
            for q in questions
        ]
        return self._sampled(prompts, wanted)

    def _write(self, questions: Sequence[Question], prompts: Sequence[Prompt]) -> list[Completion | None]:
        """Sample the answers in text; None for a question that label probabilities answer."""
        wanted = [
            None if q.wants_logprobs else self._draw(q, self._longest_answer(q), self._temperature)
            for q in questions
        ]
        return self._sampled(prompts, wanted)

    @staticmethod
    def _draw(question: Question, limit: int, temperature: float) -> Draw:
        seed, number = _numbers(question)
        return Draw(Kind(limit, temperature, seed), number)

    def _sampled(self, prompts: Sequence[Prompt], wanted: Sequence[Draw | None]) -> list[Completion | None]:
        """Sample a text for each prompt; None where none is wanted.

        The samples of one prompt are drawn together, so that the model reads it once. Each depends on the
        prompt, the seed and its index alone, whichever others are drawn.
        """
        texts: list[Completion | None] = [None] * len(prompts)
        counts: dict[Kind, dict[str, int]] = {}
        for prompt, draw in zip(prompts, wanted, strict=True):
            if draw is not None:
                own = counts.setdefault(draw.kind, {})
                own[prompt.id] = max(own.get(prompt.id, 0), draw.number + 1)
        for kind, own in counts.items():
            drawn = self._drawn(dict(zip((p.id for p in prompts), prompts, strict=True)), kind, own)
            for i, (prompt, draw) in enumerate(zip(prompts, wanted, strict=True)):
                if draw is not None and draw.kind == kind:
                    texts[i] = drawn[prompt.id].completions[draw.number]
        return texts

    def _drawn(
        self, prompts: Mapping[str, Prompt], kind: Kind, counts: Mapping[str, int]
    ) -> dict[str, Group]:
        """Return the samples of each prompt by its id, as many as `counts` says."""
        sampling = Sampling.model_validate({"temperature": kind.temperature, "max_new_tokens": kind.limit})
        drawn: dict[str, Group] = {}
        for n in sorted(set(counts.values())):
            own = [key for key, count in counts.items() if count == n]
            groups = self._snapshot().sample(
                [prompts[key] for key in own], n, sampling, seed=kind.seed, purpose="verdict"
            )
            drawn |= dict(zip(own, groups, strict=True))
        return drawn

    def _second(self, prompt: Prompt, thought: str, question: Question) -> Prompt:
        """Return the question with the model's reasoning and the request for a label."""
        assert isinstance(prompt.content, str)
        turns: Content = (
            {"role": "user", "content": prompt.content},
            {"role": "assistant", "content": thought},
            {"role": "user", "content": closing(question)},
        )
        return Prompt(turns, where=prompt.where)

    def _labels(self, questions: Sequence[Question], prompts: Sequence[Prompt]) -> list[Reading]:
        """Return the readings by label probabilities."""
        if not questions:
            return []
        groups = [
            Group(prompt, label_completions(self._codec, question.labels))
            for prompt, question in zip(prompts, questions, strict=True)
        ]
        logps = self._snapshot().logps(groups).sum().double()
        parts = torch.split(logps, [len(question.labels) for question in questions])
        return [self._reading(part, question) for part, question in zip(parts, questions, strict=True)]

    def _reading(self, logps: torch.Tensor, question: Question) -> Reading:
        mass = float(logps.exp().sum())
        if not mass >= self._mass:
            note = f"the labels {', '.join(question.labels)} have the probability {mass:.2f} together"
            return Reading("unparsed", None, mass, None, note)
        return Reading("ok", tuple(float(p) for p in logps.softmax(-1)), mass, None)

    def prompt_of(self, question: Question) -> Prompt:
        """Return the question as a prompt that leaves room for the answer.

        Raises:
            DataError: the template alone is longer than the model's context.
        """
        room = self._codec.max_length - self._written(question) - (64 if question.reasoning else 8)
        longest, fits = self._longest, 0
        prompt = self._prompt(question, longest)
        if len(self._codec.prompt_ids(prompt)) <= room:
            return prompt
        longest = min(longest, max(map(len, (*question.texts, str(question.prompt)))))
        if len(self._codec.prompt_ids(self._prompt(question, 0))) > room:
            raise DataError(
                f"the judge {self.name} takes at most {self._codec.max_length} tokens, and its question has "
                "more, even without the texts to judge; use a judge with a longer context, or a shorter "
                "--judge-template"
            )
        while longest - fits > 1:  # the most characters that fit
            middle = (fits + longest) // 2
            if len(self._codec.prompt_ids(self._prompt(question, middle))) <= room:
                fits = middle
            else:
                longest = middle
        return self._prompt(question, fits)

    def _prompt(self, question: Question, longest: int) -> Prompt:
        if not _compares(question):
            question = replace(question, repeat=0)  # all samples share one prompt, which is read once
        text = question.render(longest)
        return Prompt(text if self._codec.has_template else text + OPENING)


def _compares(question: Question) -> bool:
    """Return True if each sample has labels of its own, and so a prompt of its own."""
    return question.template.mode == "pairwise"


def _numbers(question: Question) -> tuple[int, int]:
    """Return the seed of a sample, and its index among the samples of its prompt."""
    return (question.repeat, 0) if _compares(question) else (0, question.repeat)


def _read(question: Question, answer: Completion) -> Reading:
    """Return the verdict in a written answer."""
    reader = read_points if question.template.mode == "rubric" else read_text
    return reader(answer.text, answer.finish, question.labels)


def label_completions(codec: Codec, labels: Sequence[str]) -> tuple[Completion, ...]:
    """Return the labels as distinguishable completions.

    If one label's tokens begin another's, as 1 begins 10 in tokenizers that split digits, all labels end with
    the end token.
    """
    ids = [tuple(codec.completion(Prompt("?"), label).token_ids) for label in labels]
    bare = [own[:-1] for own in ids]
    ambiguous = any(a != b and b[: len(a)] == a for a in bare for b in bare)
    return tuple(
        Completion(label, closed if ambiguous else open_, "length")
        for label, closed, open_ in zip(labels, ids, bare, strict=True)
    )


def weights_digest(model: LoadedModel) -> str:
    """Return a hash of a sample of every weight, enough to distinguish successive checkpoints of a run."""
    digest = hashlib.blake2b(digest_size=8)
    with torch.no_grad():
        for name, weight in model.network.named_parameters():
            flat = weight.detach().reshape(-1)
            some = torch.cat([flat[:16], flat[:: max(1, len(flat) // 64)]]).float().cpu()
            digest.update(name.encode() + str(tuple(weight.shape)).encode() + some.numpy().tobytes())
    return digest.hexdigest()
