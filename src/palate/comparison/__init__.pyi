from .config import CompareConfig as CompareConfig
from .work import compare_methods as compare_methods
