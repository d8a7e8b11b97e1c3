from .figures import measure as measure
from .items import Item as Item
from .items import read_items as read_items
from .work import Counts as Counts
from .work import label as label
