from .display import Display as Display
from .display import plain as plain
from .metrics import Metrics as Metrics
from .run import Run as Run
