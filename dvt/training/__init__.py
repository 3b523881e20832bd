"""Train any model: AdamW, warm-up and cosine, averaged weights, checkpoints that a killed run continues exactly.

It runs through accelerate: started by ``accelerate launch`` or ``torchrun`` it takes as many processes as there are,
and the global batch, the schedule and the order of the data stay what they are with one. A run's folder holds

    step-00001000/   model.safetensors, ema.safetensors, optimizer.safetensors, state.json: whole, or not there
    log.csv          a row each `log_every` steps: step, lr, losses, and what `validate` measured

Nothing in a step depends on the steps before it, except through the weights and the optimizer's moments: batches are a
function of the step, and so is the seed of whatever draws random numbers inside the model. So a run that is killed
at any moment ends with the weights, bit by bit, that it would have had (on one device, with the same processes).
"""

import lazy_loader

# The names stand in __init__.pyi. They are loaded when first used: settings need no torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
