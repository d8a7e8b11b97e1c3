"""Models: loading, tokens, log-probabilities, sampling, frozen snapshots."""

from palate.model.codec import Codec
from palate.model.embedded import embedded_model
from palate.model.load import load_model
from palate.model.loaded import LoadedModel
from palate.model.outputs import Outputs, TokenValues, ragged
from palate.model.plain.forward import lm_outputs, micro_batches, row_sizes, scalar_outputs
from palate.model.snapshot import Snapshot

__all__ = [
    "Codec",
    "LoadedModel",
    "Outputs",
    "Snapshot",
    "TokenValues",
    "embedded_model",
    "lm_outputs",
    "load_model",
    "micro_batches",
    "ragged",
    "row_sizes",
    "scalar_outputs",
]
