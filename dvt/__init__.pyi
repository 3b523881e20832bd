# The names that `import dvt` offers; loaded when first used (lazy_loader), and read by type checkers.
import pathlib

from .backbones import Backbone as Backbone
from .backbones import load_backbone as load_backbone
from .backbones import wrap as wrap
from .denoiser.config import DenoiserConfig as DenoiserConfig
from .denoiser.model import Denoiser as Denoiser
from .errors import DvtError as DvtError
from .fields.config import DenoiseConfig as DenoiseConfig
from .fields.decomposition import Decomposition as Decomposition
from .fields.image import denoise as denoise
from .fields.images import denoise_images as denoise_images
from .store import FeatureStore as FeatureStore
from .tokens import Tokens as Tokens
from .upsampling import upsample as upsample

__version__: str

def demo_weights() -> pathlib.Path: ...
