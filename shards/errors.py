"""What can go wrong between a raw bucket and a shard set.

UserError               anything a user can cause, in all packages: what, where, what to do
ShardError              the part of it that `shards` raises
    StoreError          the object store said no, or nothing
        NotFoundError           no such bucket or object
        AccessError             credentials missing, wrong, or without the right
        AlreadyExistsError      a create-only write met an existing object
        ChangedError            the object is not the one that was promised (ETag, size)
        UnreachableError        no answer in time, or too many failures; worth another try
    SourceError         nothing usable in the raw bucket
    PlanError           the plan does not fit these settings or this destination
    FormatError         a tar, an index or a manifest is not what it should be
"""


class UserError(Exception):
    """What the command line prints as one line, without a traceback."""


class ShardError(UserError):
    """Base of everything a user can cause in `shards`."""


class StoreError(ShardError):
    """The object store refused or failed."""


class NotFoundError(StoreError):
    """The bucket or object does not exist."""


class AccessError(StoreError):
    """The credentials are missing, wrong, or lack the right."""


class AlreadyExistsError(StoreError):
    """A create-only write met an existing object."""


class ChangedError(StoreError):
    """The object's ETag is not the one asked for."""


class UnreachableError(StoreError):
    """The store did not answer in time, after all retries."""


class SourceError(ShardError):
    """The raw bucket holds nothing to pack."""


class PlanError(ShardError):
    """A plan that does not fit the settings or the destination."""


class FormatError(ShardError):
    """A tar, an index or a manifest that cannot be right."""
