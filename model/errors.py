"""What can go wrong in the model. Plain argument errors are ``ValueError``."""


class ModelError(Exception):
    """Base of the errors of this package."""


class WeightsError(ModelError):
    """A weights file cannot be read, or does not hold what the network needs."""


class DeviceError(ModelError):
    """The device asked for is not there."""


class EngineUnavailable(ModelError):
    """An engine cannot be had here, or its masks differ too much from those of the network."""


class CheckpointError(ModelError):
    """A training checkpoint cannot be read, or belongs to another run."""


class DatasetError(ModelError):
    """A dataset is missing, incomplete or laid out otherwise."""


class ResultsError(ModelError):
    """Masks that were stored for evaluation do not fit the dataset."""


class TrainingError(ModelError):
    """Training cannot go on."""
