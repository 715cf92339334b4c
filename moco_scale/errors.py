"""What can go wrong between two views and a trained encoder.

TrainError              one line: what, where, what to do
    ConfigError         settings that cannot be right, alone or together
    CheckpointError     a checkpoint that is missing, torn, or of another model
    EvaluationError     labels or features that cannot be scored
    ExportError         a format that does not fit the encoder, or another export in the place
    EmbedError          features that cannot be made, or others' in their place
    LostRankError       another process of the run is gone or silent; worth another start
"""

from shards.errors import UserError

EXIT_AGAIN = 75
"""Exit code of a run that only needs to be started again (EX_TEMPFAIL of sysexits.h)."""


class TrainError(UserError):
    """Base of everything a user can cause in `moco_scale`."""


class ConfigError(TrainError):
    """Settings that cannot be right, alone or together."""


class CheckpointError(TrainError):
    """A checkpoint that is missing, torn, or of another model."""


class EvaluationError(TrainError):
    """Labels or features that cannot be scored."""


class ExportError(TrainError):
    """A format that does not fit the encoder, or another export in the place."""


class EmbedError(TrainError):
    """Features that cannot be made, or others' in their place."""


class LostRankError(TrainError):
    """Another process of the run is gone or silent; the same command started again goes on."""
