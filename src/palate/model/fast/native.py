"""Palate's own functions for a CPU, compiled with the user's C++ compiler (`--compile`).

Between its products, a layer normalises, rotates, gates and attends, and the head compares logits with
targets. torch runs each of these as many operations, and each reads and writes memory. The files in `cpp` do
each in one pass, with vectors and threads, for sampling (`native_step`) and learning (`native_layers`,
`native_head`, `native_passes`).

The code depends on the sizes of heads, the number format and the processor, not on the work. It is compiled
once, in a few seconds, and kept in torch's directory of compiled code. It is trusted only after a test
against the plain way, on a layer of the model (`native_test`).
"""

from __future__ import annotations

import ctypes
import inspect
import logging
import math
import platform
import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palate.model.fast.lean import kind_of

log = logging.getLogger("palate")

FILES = (
    *("vectors.h", "tiles.h", "records.h", "layer.cpp", "step.cpp", "head.cpp"),
    *("attention.cpp", "tiled.cpp", "rows.cpp", "gradient.cpp", "few.cpp", "weights.cpp"),
)
PANEL = 32
"""Products with matrix units have whole panels of so many rows and columns."""
FAILURES = (
    *(RuntimeError, OSError, ImportError, AssertionError),
    *(TypeError, ValueError, AttributeError, LookupError),
)
"""Errors of the parts of a compiler; those of torch are RuntimeErrors."""


class _Address:
    """The type of an argument that is memory: a tensor, its address, or None."""

    @classmethod
    def from_param(cls, given: Tensor | int | None) -> ctypes.c_void_p:
        """Return the address. Tensors must be contiguous."""
        if isinstance(given, Tensor):
            assert given.is_contiguous(), "compiled functions read contiguous memory"
            assert given.is_cpu, f"compiled functions got a tensor on {given.device}"
            return ctypes.c_void_p(given.data_ptr())
        return ctypes.c_void_p(given)


_TYPES: dict[str, Any] = {"a": _Address, "i": ctypes.c_int64, "f": ctypes.c_float}
SIGNATURES = {
    "normalise": "aaaaaaiif",
    "normalise_back": "aaaaaaaii",
    "gate": "aaiaii",
    "gate_back": "aaaaaai",
    "rotate": "aiaafaii",
    "attend": "aaaaaiiaaiaaiaafia",
    "draw": "aiifaaaiaaa",
    "score_targets": "aaaaaaaii",
    "slope": "aaaaaii",
    "attend_row": "aaaaifiaa",
    "attend_row_back": "aaaaaaaifiaaa",
    "has_tiles": "",
    "weight_gradients": "aiaii",
    "pack_weight": "aaii",
    "few_rows": "aaaaiii",
    "squares": "ai",
    "accumulate": "aai",
    "narrow": "aai",
}
"""The arguments of the functions in `cpp`: addresses, integers and floating-point numbers."""
RESULTS: dict[str, Any] = {"draw": ctypes.c_int64, "has_tiles": ctypes.c_int64, "squares": ctypes.c_double}
"""The types of what functions return, where they return anything."""


class Kind(NamedTuple):
    """The properties of layers that share compiled functions."""

    dtype: torch.dtype
    query_heads: int
    key_heads: int
    size: int

    @classmethod
    def of(cls, network: Any) -> Kind | None:
        """Return the kind of a network's layers; None if there are no functions for them."""
        if kind_of(network) is None or network.device.type != "cpu":
            return None
        if network.dtype not in (torch.float32, torch.bfloat16) or not _is_uniform(network):
            return None
        attention = network.base_model.layers[0].self_attn
        size = attention.head_dim
        query, key = (part.out_features // size for part in (attention.q_proj, attention.k_proj))
        return cls(network.dtype, query, key, size)


def _abilities() -> str:
    """Return a line that names what this processor can do."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {flags}"


def _is_uniform(network: Any) -> bool:
    """Return whether all weights that the functions read have the format of the network."""
    model, head = network.base_model, network.get_output_embeddings()
    norms = [module for module in model.modules() if hasattr(module, "variance_epsilon")]
    read = [model.embed_tokens, *norms, *(() if head is None else (head,))]
    return all(module.weight.dtype == network.dtype for module in read)


class Library:
    """The functions of `cpp` as attributes, for layers of a kind.

    Attributes:
        kind: the kind of layers.
        tested_steps: True if the functions of sampling steps have been compared with the plain way.
    """

    tested_steps = False

    def __init__(self, kind: Kind) -> None:
        """Compile the functions, or find them in torch's directory of compiled code.

        Raises:
            Exception: one of `FAILURES`.
        """
        from torch._inductor.codecache import CppCodeCache

        self.kind = kind
        self._kept = threading.local()
        numbers = {
            "HALF": int(kind.dtype == torch.bfloat16),
            "QUERY_HEADS": kind.query_heads,
            "KEY_HEADS": kind.key_heads,
            "SIZE": kind.size,
        }
        # Code for one processor may not run on another, so its abilities are part of what is compiled.
        lines = [f"// {_abilities()}"]
        lines += [f"#define {name} {number}" for name, number in numbers.items()]
        lines += [(Path(__file__).parent / "cpp" / name).read_text(encoding="utf-8") for name in FILES]
        options = {"extra_flags": ("-ffp-contract=fast",), "needs_vec_isa": False}
        known = inspect.signature(getattr(CppCodeCache, "load_async", CppCodeCache.load)).parameters
        wanted = {name: value for name, value in options.items() if name in known}  # older torch has fewer
        library = CppCodeCache.load("\n".join(lines), **wanted)
        for name, types in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = [_TYPES[letter] for letter in types]
            function.restype = RESULTS.get(name)
            setattr(self, name, function)

    def checked(self, tensor: Tensor) -> Tensor:
        """Return a tensor in the form that the functions read: contiguous, in their number format."""
        assert tensor.dtype == self.kind.dtype, f"compiled functions got {tensor.dtype}"
        return tensor.contiguous()

    def workspace(self, *shape: int) -> Tensor:
        """Return memory of this thread, with any content, which stays: new memory is cleared by the system.

        It is the same at each call, and as large as the largest one so far.
        """
        count = math.prod(shape)
        kept = getattr(self._kept, "memory", None)
        if kept is None or kept.numel() < count:
            kept = self._kept.memory = None  # freed first
            with torch.inference_mode(False):  # it may serve to learn later
                kept = self._kept.memory = torch.empty(count, dtype=self.kind.dtype)
        self._kept.use = object()
        return kept[:count].view(shape)

    @property
    def use(self) -> object:
        """A mark of this thread's last call of `workspace`: while it is the same, so is the content."""
        return getattr(self._kept, "use", None)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


_LIBRARIES: dict[Kind, Library | None] = {}
"""The functions of this process, after their test; None if they failed."""


def library_of(network: Any) -> Library | None:
    """Return the tested functions for a network's layers.

    None means that there are none for such layers, or that they failed, with an error in the log once.
    """
    kind = Kind.of(network)
    if kind is None:
        return None
    if kind not in _LIBRARIES:
        from palate.model.fast.native_test import test  # needs the parts that use this module

        try:
            library = Library(kind)
            test(library, network)
            _LIBRARIES[kind] = library
        except FAILURES as error:
            _LIBRARIES[kind] = None
            reason = " ".join(str(error).split())[:160]
            # An error, because processes other than the first log no warnings.
            log.error(
                "compiled functions cannot be used, so the plain way is: %s: %s", type(error).__name__, reason
            )
    return _LIBRARIES[kind]
