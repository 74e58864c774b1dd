"""Every error a user can meet. Each message says what is wrong, where, and what to do next."""


def first_line(error: BaseException) -> str:
    """What an error of another package says, in one line without a full stop; its class, if it says nothing.

    A line that ends in a colon says nothing without the next one, which is added.

    Example:
        >>> first_line(ValueError("no such key.\\nAll keys: a, b"))
        'no such key'
        >>> first_line(RuntimeError("Errors for Net:\\n\\tsize mismatch for w.\\n\\tsize mismatch for b."))
        'Errors for Net: size mismatch for w'
    """
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    count = 2 if lines and lines[0].endswith(":") else 1
    return " ".join(lines[:count]).rstrip(".") or type(error).__name__


class FxmergeError(Exception):
    """Base class of all errors raised by fxmerge."""


class CaptureError(FxmergeError, RuntimeError):
    """No route could turn a model into a graph."""


class CheckpointError(FxmergeError, ValueError):
    """A file of weights is missing, damaged, or does not fit the network that it is for."""


class OutputError(FxmergeError, OSError):
    """A result cannot be written: the target exists, is in use, or the disk is full."""


class ArchitectureMismatchError(FxmergeError, ValueError):
    """The models to be merged or aligned do not have the same architecture."""


class NonFiniteError(FxmergeError, ValueError):
    """A weight or an activation is NaN or infinite."""


class LoaderError(FxmergeError, ValueError):
    """The calibration data is empty, or its batches do not fit the model."""


class OptionError(FxmergeError, ValueError):
    """An argument is outside of its range.

    Attributes:
        field: the field of a recipe, a run or a plan that it is, if it is one.
    """

    field: str | None = None


class ProcessError(FxmergeError, RuntimeError):
    """Another process of the same run has failed, has ended, or does something else than this one."""


class PermutationError(FxmergeError, ValueError):
    """A permutation and the state dict or symmetry it is used with do not belong together."""


class SpecError(FxmergeError, ValueError):
    """A symmetry that was read or handed in is malformed, or is not one of the model it is used with."""


class UnitMapError(FxmergeError, ValueError):
    """A map of units is not of these models, or cannot do what is asked of it."""
