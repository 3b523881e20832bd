# The names that `dvt.views` offers; loaded when first used (lazy_loader), and read by type checkers.
from .config import ViewConfig as ViewConfig
from .sampling import Shifts as Shifts
from .sampling import Views as Views
from .sampling import cut as cut
from .sampling import cut_window as cut_window
from .sampling import draw_boxes as draw_boxes
from .sampling import resize as resize
from .sampling import resize_part as resize_part
