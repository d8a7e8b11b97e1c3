"""A judge in this process: any causal language model, by its label probabilities or its own words."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch

from palate.annotate.judges.desk import Desk
from palate.annotate.judges.prices import FREE
from palate.annotate.judges.reading import MASS, Reading, read_points
from palate.annotate.judges.records import Amount, Question, Verdict, closing
from palate.config import ModelConfig, Sampling
from palate.errors import BudgetError, DataError
from palate.model import Codec, LoadedModel, Snapshot, load_model
from palate.types import Completion, Content, Group, Prompt

TOGETHER = 32
"""Questions asked between two writes to the ledger."""

OPENING = "\n\nAnswer:\n"
"""Behind the question, where no chat template opens the model's turn."""


class LocalModel:
    """Asks a causal language model in this process.

    Its codec never reads a text's characters as control tokens, so nothing in a completion can end the turn
    that it stands in. Texts that do not fit the model's context are cut at their ends.

    Args:
        snapshot: gives the model to ask, which may be another one each time.
        codec: gives that of the model.
        name: for people.
        identity: gives all that tells the model from others, for keys.
        max_tokens: that the judge may write for a verdict in text.
        mass: least probability of the labels together.
        longest: characters shown of each text.
    """

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        codec: Callable[[], Codec],
        *,
        name: str,
        identity: Callable[[], Mapping[str, Any]],
        max_tokens: int = 16,
        mass: float = MASS,
        longest: int = 8000,
    ) -> None:
        self.name, self._snapshot, self._get_codec = name, snapshot, codec
        self._identity = identity
        self._options = {"max_tokens": max_tokens, "mass": mass, "longest": longest}
        self._max_tokens, self._mass, self._longest = max_tokens, mass, longest

    @classmethod
    def load(cls, name: str, *, model_options: Mapping[str, Any], **options: Any) -> LocalModel:
        """Load a judge from a hub id, a model's directory or a run's.

        Raises:
            ModelError: it cannot be loaded, or writes nothing.
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
        """All that an answer depends on besides the question."""
        return {**self._identity(), **self._options}

    def ask(self, asked: Mapping[str, Question], desk: Desk) -> None:
        """Answer questions; see `JudgeModel.ask`."""
        waiting = iter(asked.items())
        while part := list(islice(waiting, TOGETHER)):
            self._ask(part, desk)

    def _ask(self, part: Sequence[tuple[str, Question]], desk: Desk) -> None:
        started = time.perf_counter()
        prompts = [self._fitted(question) for _, question in part]
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
        """What is reserved for the first questions, up to where a limit is reached."""
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
        """Tokens that the model may write."""
        own = max(self._max_tokens, question.reasoning)
        return own if not question.wants_logprobs else 1 + question.reasoning

    def _verdicts(
        self, questions: Sequence[Question], prompts: Sequence[Prompt]
    ) -> list[tuple[Reading, str, int]]:
        """Reading, text and number of written tokens of each."""
        if not questions:
            return []
        texts: list[tuple[str, int, str]] = [("", 0, "")] * len(questions)
        asked = list(prompts)
        for i, question in enumerate(questions):
            if question.reasoning or not question.wants_logprobs:
                texts[i] = self._write(question, prompts[i])
                if question.wants_logprobs:
                    asked[i] = self._second(prompts[i], texts[i][0], question)
        by_label = [i for i, question in enumerate(questions) if question.wants_logprobs]
        by_logps = self._labels([questions[i] for i in by_label], [asked[i] for i in by_label])
        readings = dict(zip(by_label, by_logps, strict=True))
        found = []
        for i, question in enumerate(questions):
            text, tokens, finish = texts[i]
            reading = readings.get(i) or read_points(text, finish, question.labels)
            found.append((reading, text, tokens + (i in readings)))
        return found

    def _write(self, question: Question, prompt: Prompt) -> tuple[str, int, str]:
        """What the model writes about a question: text, tokens, and why it ended."""
        limit = self._written(question) - question.wants_logprobs
        temperature = 0.0 if question.wants_logprobs else 1.0
        sampling = Sampling.model_validate({"temperature": temperature, "max_new_tokens": limit})
        seed = int(question.nonce[:8], 16)
        (group,) = self._snapshot().sample([prompt], 1, sampling, seed=seed, purpose="verdict")
        (written,) = group.completions
        return written.text, len(written.token_ids), written.finish

    def _second(self, prompt: Prompt, thought: str, question: Question) -> Prompt:
        """The question again, with the model's reasoning and the request for a label."""
        assert isinstance(prompt.content, str)
        turns: Content = (
            {"role": "user", "content": prompt.content},
            {"role": "assistant", "content": thought},
            {"role": "user", "content": closing(question)},
        )
        return Prompt(turns, where=prompt.where)

    def _labels(self, questions: Sequence[Question], prompts: Sequence[Prompt]) -> list[Reading]:
        """Readings by label probabilities."""
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

    def _fitted(self, question: Question) -> Prompt:
        """The question as a prompt that leaves room for the answer.

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
                f"the judge {self.name} takes {self._codec.max_length} tokens, fewer than its question has "
                "without any text; take a judge with a longer context, or a shorter --judge-template"
            )
        while longest - fits > 1:  # the most characters that fit
            middle = (fits + longest) // 2
            if len(self._codec.prompt_ids(self._prompt(question, middle))) <= room:
                fits = middle
            else:
                longest = middle
        return self._prompt(question, fits)

    def _prompt(self, question: Question, longest: int) -> Prompt:
        text = question.render(longest)
        return Prompt(text if self._codec.has_template else text + OPENING)


def label_completions(codec: Codec, labels: Sequence[str]) -> tuple[Completion, ...]:
    """The labels as completions that can be told apart.

    Where one label's tokens begin another's, as 1 begins 10 in tokenizers that take digits apart, the end
    token closes them all.
    """
    ids = [tuple(codec.completion(Prompt("?"), label).token_ids) for label in labels]
    bare = [own[:-1] for own in ids]
    ambiguous = any(a != b and b[: len(a)] == a for a in bare for b in bare)
    return tuple(
        Completion(label, closed if ambiguous else open_, "length")
        for label, closed, open_ in zip(labels, ids, bare, strict=True)
    )


def weights_digest(model: LoadedModel) -> str:
    """A hash of some numbers of every weight: enough to tell a run's model from the same run's next one."""
    found = hashlib.blake2b(digest_size=8)
    with torch.no_grad():
        for name, weight in model.network.named_parameters():
            flat = weight.detach().reshape(-1)
            some = torch.cat([flat[:16], flat[:: max(1, len(flat) // 64)]]).float().cpu()
            found.update(name.encode() + str(tuple(weight.shape)).encode() + some.numpy().tobytes())
    return found.hexdigest()
