"""For users' tests and ours: the contract check of a routing strategy."""

from typed_moe.testing._check_strategy import check_strategy

__all__ = ["check_strategy"]
