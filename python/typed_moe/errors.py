"""Exception types, apart from the rooms so that every room may raise them."""


class UnsupportedRouting(ValueError):
    """A kernel, a format or a config asks for routing that cannot be honoured.

    Raised at construction, before a weight is loaded. The message names what was asked, the
    limit with its numbers, and an alternative.
    """


class CheckpointError(ValueError):
    """A checkpoint's tensors do not fit the layer: missing, truncated, wrong shape or dtype."""
