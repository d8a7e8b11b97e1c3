from .config import PoolConfig as PoolConfig
from .work import Made as Made
from .work import make_pool as make_pool
