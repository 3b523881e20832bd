"""Train any model: AdamW, warm-up and cosine, averaged weights, checkpoints from which a killed run continues exactly.

Training uses accelerate: with ``accelerate launch`` or ``torchrun`` it runs in all of their processes, with the same
global batch, schedule and order of the data as in one process. A run's folder holds

    step-00001000/   model.safetensors, ema.safetensors, optimizer.safetensors, state.json: all of them, or no folder
    log.csv          a row every `log_every` steps: step, lr, losses, and the results of `validate`

A step depends on earlier steps only through the weights and the optimizer's moments: batches are a function of the
step, and so is the seed of random numbers inside the model. So a run that is killed at any moment and continued ends
with the same weights, bit by bit, as an uninterrupted one (on one device, with the same processes).
"""

import lazy_loader

# The names are in __init__.pyi. They are loaded when first used, because settings need no torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
