from .config import EvaluateConfig as EvaluateConfig
from .work import evaluate as evaluate
