"""Outputs of completions from padded batches and the model's own forward.

They are correct for every causal model: padding is on the right, where real tokens cannot see it. The tests
compare the fast engine with these outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from palate.model.codec import Codec
from palate.model.heads import HeadValues, scores_of
from palate.model.loaded import LoadedModel
from palate.model.outputs import Outputs, ragged
from palate.types import Record


@dataclass(frozen=True)
class Rows:
    """N prompts with one completion each, as one right-padded batch.

    Attributes:
        input_ids: int64 (N, L).
        attention_mask: int64 (N, L), 1 for real tokens.
        prompt_lengths, lengths: length of the prompt, and of prompt plus completion. int64 (N,)
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompt_lengths: Tensor
    lengths: Tensor


def rows_of(records: Sequence[Record], codec: Codec, device: torch.device) -> Rows:
    """Return the batch of prompt and completion tokens of the records' completions, in order."""
    prompts = [codec.prompt_ids(record.prompt) for record in records for _ in record.completions]
    whole = [
        torch.tensor((*prompt, *completion.token_ids))
        for prompt, completion in zip(prompts, (c for r in records for c in r.completions), strict=True)
    ]
    lengths = torch.tensor([len(ids) for ids in whole])
    # The value of the padding has no effect, since the mask comes from lengths.
    input_ids = pad_sequence(whole, batch_first=True, padding_value=codec.end_id)
    attention_mask = (torch.arange(input_ids.shape[1])[None] < lengths[:, None]).long()
    prompt_lengths = torch.tensor([len(ids) for ids in prompts])
    return Rows(*(t.to(device) for t in (input_ids, attention_mask, prompt_lengths, lengths)))


def lm_outputs(
    model: LoadedModel, records: Sequence[Record], *, statistics: bool = False, top_logits: int = 0
) -> Outputs:
    """Compute log-probabilities of the completions' tokens, in float32.

    Args:
        model: a causal language model.
        records: prompts with completions, N completions in total.
        statistics: also compute entropy and top1.
        top_logits: number of the largest logits to return at each token's position, with the token's own.
    """
    rows = rows_of(records, model.codec, model.device)
    first = int(rows.prompt_lengths.min()) - 1  # position p predicts token p + 1
    keep = torch.arange(first, rows.input_ids.shape[1] - 1, device=model.device)
    inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask, "use_cache": False}
    if model.keeps_logits:
        logits = model.network(**inputs, logits_to_keep=keep).logits
    else:
        logits = model.network(**inputs).logits[:, keep]
    at = keep[None] + 1
    where = (at >= rows.prompt_lengths[:, None]) & (at < rows.lengths[:, None])  # (N, K)
    scored = logits[where].float()  # (M, V): only completion tokens
    targets = rows.input_ids[:, first + 1 :][where]
    values = HeadValues.of_logits(scored, targets, statistics=statistics, top_logits=top_logits)
    return Outputs.of(values, (rows.lengths - rows.prompt_lengths).tolist(), statistics=statistics)


def scalar_outputs(model: LoadedModel, records: Sequence[Record]) -> Outputs:
    """Compute a sequence classifier's score at the last token of each completion.

    The head is applied here, because transformers reads the last token that is not padding; that token is
    wrong if padding and end token are the same.
    """
    rows = rows_of(records, model.codec, model.device)
    hidden = _hidden(model, rows)
    last = hidden[torch.arange(len(hidden), device=hidden.device), rows.lengths - 1]
    return Outputs(scores=scores_of(model.network, last))


def value_outputs(model: LoadedModel, records: Sequence[Record]) -> Outputs:
    """Compute a value head's output for the state before each token of the completions.

    The value of a token is read where the language model predicts it: at the token before, for the first one
    at the prompt's last.
    """
    rows = rows_of(records, model.codec, model.device)
    hidden = _hidden(model, rows)
    at = torch.arange(hidden.shape[1], device=hidden.device)[None] + 1
    where = (at >= rows.prompt_lengths[:, None]) & (at < rows.lengths[:, None])
    values = scores_of(model.network, hidden[where])
    return Outputs(values=ragged(torch.split(values, (rows.lengths - rows.prompt_lengths).tolist())))


def _hidden(model: LoadedModel, rows: Rows) -> Tensor:
    """Return the last hidden states. (N, L, H)"""
    hidden: Tensor = model.network.base_model(
        input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False
    ).last_hidden_state
    return hidden


def micro_batches(sizes: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Return indices of records to compute together: of similar length, at most `budget` padded tokens.

    Args:
        sizes: for each record, the token counts of its rows. A record is never split.
        budget: most tokens in a padded batch; a larger record is its own batch.
    """
    order = sorted(range(len(sizes)), key=lambda i: (max(sizes[i]), i))
    batches: list[list[int]] = []
    rows = 0
    for i in order:
        rows += len(sizes[i])
        if not batches or rows * max(sizes[i]) > budget:
            batches.append([])
            rows = len(sizes[i])
        batches[-1].append(i)
    return batches


def row_sizes(records: Sequence[Record], codec: Codec) -> list[list[int]]:
    """Return the token counts of every row of every record, for `micro_batches`."""
    return [[len(codec.prompt_ids(r.prompt)) + len(c.token_ids) for c in r.completions] for r in records]
