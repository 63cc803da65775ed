"""The errors that kvfold raises on purpose. Each names the thing, the reason and the way out."""


class KVFoldError(Exception):
    """Base of every error that kvfold raises on purpose."""


class FormatError(KVFoldError, ValueError):
    """A format cannot be understood, or cannot be used for this shape."""


class NotBuiltError(KVFoldError, NotImplementedError):
    """A format is well spelled, but the family that it names is not built yet."""


class ShapeError(KVFoldError, ValueError):
    """A tensor has the wrong shape, dtype, device or stride for an operation."""


class CapacityError(KVFoldError, RuntimeError):
    """A cache has no room left for the tokens it was asked to hold, or an operation for those it was asked to read."""


class FileFormatError(KVFoldError, ValueError):
    """A saved cache is corrupted, truncated, foreign or of another format or shape."""


class UnsupportedModelError(KVFoldError, ValueError):
    """A model cannot run on a compressed cache, with the reason and the way out."""


class PlanError(KVFoldError, ValueError):
    """A model's config, a size of memory or a number of tokens that cannot be planned with."""


class UnknownSequenceError(KVFoldError, KeyError):
    """A paged cache holds no sequence by this number."""

    def __str__(self) -> str:  # KeyError would quote the message
        return str(self.args[0])
