# The names that `dvt.training` offers; loaded when first used (lazy_loader), and read by type checkers.
from .config import TrainingConfig as TrainingConfig
from .config import flat_settings as flat_settings
from .data import epoch_indices as epoch_indices
from .data import hold_out as hold_out
from .data import sides_digest as sides_digest
from .log import LogRow as LogRow
from .loop import Batches as Batches
from .loop import LossFunction as LossFunction
from .loop import Trained as Trained
from .loop import train as train
