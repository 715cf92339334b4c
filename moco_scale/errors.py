"""What can go wrong between two views and a trained encoder.

TrainError              one line: what, where, what to do
    ConfigError         settings that cannot be right, alone or together
    CheckpointError     a checkpoint that is missing, torn, or of another model
    EvaluationError     labels or features that cannot be scored
"""

from shards.errors import UserError


class TrainError(UserError):
    """Base of everything a user can cause in `moco_scale`."""


class ConfigError(TrainError):
    """Settings that cannot be right, alone or together."""


class CheckpointError(TrainError):
    """A checkpoint that is missing, torn, or of another model."""


class EvaluationError(TrainError):
    """Labels or features that cannot be scored."""
