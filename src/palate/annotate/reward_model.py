"""A Hugging Face sequence classifier as a scorer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

import torch

from palate.config import ModelConfig
from palate.model import LoadedModel, load_model
from palate.model.paths import batched_scores
from palate.types import Completion, Group, Prompt


class RewardModel:
    """Scores a prompt with its completion by a classifier with one output.

    The text is tokenised anew with the reward model's own tokenizer and chat template; a policy's tokens
    would mean nothing to it. It is always closed by the end token, where a reward model has learnt to give
    its score, also if the completion was cut: that is what `missing_eos_penalty` is for.
    """

    def __init__(self, model: LoadedModel, *, micro_batch_tokens: int = 8192) -> None:
        self.model = model
        self.name = f"model:{model.source}"
        self._budget = micro_batch_tokens

    @classmethod
    def load(
        cls, name: str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
    ) -> RewardModel:
        """Load a classifier from a hub id or a directory.

        Raises:
            ModelError: it cannot be loaded, or is no causal classifier with one output.
        """
        cfg = ModelConfig.model_validate(
            {
                "model": name,
                "device": device,
                "dtype": dtype,
                "lora": False,
                "trust_remote_code": trust_remote_code,
            }
        )
        model = load_model(cfg, head="scalar", trainable=False)
        return cls(model)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        """One reward per completion: the classifier's output, unscaled."""
        codec = self.model.codec
        # Completions of one prompt stand together, and share what is computed of it.
        groups = [
            Group(prompt, tuple(codec.completion(prompt, completion.text) for _, completion in together))
            for prompt, together in groupby(zip(prompts, completions, strict=True), key=itemgetter(0))
        ]
        return list(batched_scores(self.model, groups, self._budget).tolist()) if groups else []
