from .display import Display as Display
from .display import plain as plain
from .drift import BoundReachedError as BoundReachedError
from .drift import Drift as Drift
from .judging import judge_annotator as judge_annotator
from .judging import own_judge as own_judge
from .metrics import Metrics as Metrics
from .run import Run as Run
