"""A Hugging Face sequence classifier as a scorer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

import torch

from palate.config import ModelConfig
from palate.model import LoadedModel, load_model
from palate.model.batched import batched_scores
from palate.types import Completion, Group, Prompt


class RewardModel:
    """Scores a prompt with its completion by a classifier with one output.

    The text is tokenised with the reward model's own tokenizer and chat template, because a policy's tokens
    mean nothing to it. The score is read at the last token of the rendered conversation that is not padding,
    as the classifiers of transformers read it, even if the completion was truncated; `missing_eos_penalty`
    handles that case. A text that does not fit the model's context is truncated at its end, as in training,
    and scored at its last token.
    """

    def __init__(self, model: LoadedModel, *, micro_batch_tokens: int = 8192) -> None:
        self.model = model
        self.name = f"model:{model.source}"
        self._budget = micro_batch_tokens

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        fast: bool = True,
    ) -> RewardModel:
        """Load a classifier from a hub id or a directory.

        Raises:
            ModelError: it cannot be loaded, or is not a causal classifier with one output.
        """
        cfg = ModelConfig.model_validate(
            {
                "model": name,
                "device": device,
                "dtype": dtype,
                "lora": False,
                "trust_remote_code": trust_remote_code,
                "fast": fast,
            }
        )
        model = load_model(cfg, head="scalar", trainable=False)
        return cls(model)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        """Return one reward per completion: the classifier's output, unscaled."""
        groups = [
            part
            for prompt, together in groupby(zip(prompts, completions, strict=True), key=itemgetter(0))
            for part in self._parts(prompt, [completion.text for _, completion in together])
        ]
        return list(batched_scores(self.model, groups, self._budget).tolist()) if groups else []

    def _parts(self, prompt: Prompt, texts: Sequence[str]) -> list[Group]:
        """Split completions of a prompt into batches as large as the token budget allows."""
        # Reward models are trained on finished conversations.
        prompt, completions = self.model.codec.answers(prompt.to_sample(), texts)
        before = len(self.model.codec.prompt_ids(prompt))
        parts: list[list[Completion]] = []
        for completion in completions:
            wider = [*(parts[-1] if parts else ()), completion]
            sizes = [len(c.token_ids) for c in wider]
            if parts and self.model.engine.tokens(before, sizes) <= self._budget:
                parts[-1] = wider
            else:
                parts.append([completion])
        return [Group(prompt, tuple(part)) for part in parts]
