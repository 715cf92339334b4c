"""What can go wrong between a shard set and two views on the device.

PipelineError           one line: what, where, what to do
    OrderError          the settings give no order: too few samples, a world that is not allowed
    StateError          a saved position that belongs to another stream
    StalledError        a stage gave nothing before its deadline
    BadDataError        more bad samples than the budget allows
"""

from shards.errors import UserError


class PipelineError(UserError):
    """Base of everything a user can cause in `pipelines`."""


class OrderError(PipelineError):
    """The settings do not give an order."""


class StateError(PipelineError):
    """A saved position that belongs to another stream."""


class StalledError(PipelineError):
    """A stage gave nothing before its deadline."""


class BadDataError(PipelineError):
    """More bad samples than the budget allows."""
