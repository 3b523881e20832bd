"""Define the errors of bad input. Each message says what was given, what is allowed, and what to do."""


class DvtError(ValueError):
    """Base of all errors that dvt raises for bad input; the command line turns it into exit code 2."""


class ImageError(DvtError):
    """An image cannot be found, read or used."""


class BackboneError(DvtError):
    """A backbone is unknown, unsupported, or was asked for something that it cannot do."""


class WeightsError(DvtError):
    """Weights cannot be found, do not fit the model, or are not finite."""


class ShapeError(DvtError):
    """An array has another shape than the function takes."""


class StoreError(DvtError):
    """A feature store is damaged, locked, or was made by another job."""


class ConfigError(DvtError):
    """A setting is outside its range, or two settings contradict each other."""


class NonFiniteError(DvtError):
    """A computation met NaN or infinity."""


class DataError(DvtError):
    """Labelled data is missing, incomplete, or contradicts itself."""
