"""The processes of a run: one by default, or N that train one model together. It loads no torch by itself."""

from palate.world.base import Alone, World, cause_of, current, one_at_a_time, use
from palate.world.split import join, own_part, shared_rows

__all__ = ["Alone", "World", "cause_of", "current", "join", "one_at_a_time", "own_part", "shared_rows", "use"]
