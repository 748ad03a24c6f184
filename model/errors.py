"""What can go wrong in the model. Plain argument errors are ``ValueError``."""


class ModelError(Exception):
    """Base of the errors of this package."""


class WeightsError(ModelError):
    """A weights file cannot be read, or does not hold what the network needs."""


class DeviceError(ModelError):
    """The device asked for is not there."""
