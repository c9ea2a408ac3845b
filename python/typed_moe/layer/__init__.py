"""Room 6: the layer. It owns weights and bias, and calls its runner."""

from typed_moe.layer._fused_moe import FusedMoE

__all__ = ["FusedMoE"]
