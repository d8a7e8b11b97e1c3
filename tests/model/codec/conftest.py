"""Small tokenizers of the kinds that users bring."""

import json

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
MERGES = "Ċ Ċ|t h|th e|a n|i n|Ġ a|Ġ the|o u|Ġ Ġ|< |||| >|> Ċ|. Ċ|l l|ll o|: Ċ"
"""Pairs of a byte-level BPE, some across the borders of turns: two line breaks, `>` with a line break."""


def byte_level(special, plain=(), **names):
    """Merges bytes as GPT-2's and Qwen's do; `plain` are added tokens that are not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("<", "|"), ("|", ">")] + [tuple(m.split()) for m in MERGES.split("|") if len(m.split()) == 2]
    merges = [(a, b) for a, b in merges if a and b]
    words = [*alphabet, *dict.fromkeys(a + b for a, b in merges), *special, *plain]
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return _wrapped(made, special, plain, names)


def sentence_pieces(special, plain=(), *, scheme="first", **names):
    """Puts a space before the first word of a text, as the tokenizers of Llama 2 and Mistral do."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme=scheme, split=True)
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    rare = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False, special_tokens=["<unk>", *rare])
    texts = ["Sure, a week has seven days.", "No idea, sorry.", "user assistant system", "Hello there, hi"]
    made.train_from_iterator(texts * 40, trainer)
    described = json.loads(made.to_str())
    described["added_tokens"] = [t for t in described["added_tokens"] if t["content"] == "<unk>"]
    return _wrapped(
        Tokenizer.from_str(json.dumps(described)), special, plain, {"unk_token": "<unk>", **names}
    )


def _wrapped(made, special, plain, names):
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    made.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    names = {"eos_token": special[0], "bos_token": special[1], "model_max_length": 100_000, **names}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


TOKENIZERS = {
    "bytes": byte_level,
    "pieces": sentence_pieces,
    "pieces, each text": lambda *a, **k: sentence_pieces(*a, scheme="always", **k),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer_of(request):
    """A function of special and plain added tokens that makes a tokenizer."""
    return TOKENIZERS[request.param]
