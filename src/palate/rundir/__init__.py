"""Read run directories. This package does not import torch, so that listing runs and reports start at once.

`palate.run` writes these directories. All code that reads them uses this package: `palate runs`, `report`
and `chat`, `--model RUN`, `--reward model:RUN`, and resuming a run.
"""

from palate.rundir.checkpoints import checkpoint, checkpoints_in
from palate.rundir.config import description_in, holds_run, read_description
from palate.rundir.files import UNREADABLE, read_json, read_object
from palate.rundir.metrics import latest_numbers, read_summary
from palate.rundir.model import model_in
from palate.rundir.record import RunRecord, Sample, read_run, read_runs, run_names
from palate.rundir.status import LOCK, State, Status, is_held, read_status

__all__ = [
    "LOCK",
    "UNREADABLE",
    "RunRecord",
    "Sample",
    "State",
    "Status",
    "checkpoint",
    "checkpoints_in",
    "description_in",
    "holds_run",
    "is_held",
    "latest_numbers",
    "model_in",
    "read_description",
    "read_json",
    "read_object",
    "read_run",
    "read_runs",
    "read_status",
    "read_summary",
    "run_names",
]
