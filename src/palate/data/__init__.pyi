from .formats import read_comparisons as read_comparisons
from .formats import read_demonstrations as read_demonstrations
from .formats import read_prompts as read_prompts
from .rows import Row as Row
from .rows import read_rows as read_rows
from .stream import Stream as Stream
from .write import check_target as check_target
from .write import write_rows as write_rows
