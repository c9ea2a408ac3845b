"""A routing rule of your own: two members, ten lines, every runner.

Softmax over the k best logits at a temperature of 2, so that the weights are flatter than
`Renormalize` gives them.
"""

import torch
from torch import Tensor

from typed_moe import FusedMoE, Routed, RoutingShape, RoutingStrategy
from typed_moe.routing import float_logits, routed, top_k_ids
from typed_moe.testing import check_strategy


class Tempered(RoutingStrategy):
    name = "Tempered"

    def select_experts(
        self, router_logits: Tensor, e_score_correction_bias: Tensor | None, *, shape: RoutingShape
    ) -> Routed:
        logits, usable = float_logits(router_logits)
        ids = top_k_ids(logits, shape.top_k)
        return routed(ids, torch.softmax(logits.gather(-1, ids) / 2.0, dim=-1), usable)


def main() -> None:
    """Check the strategy's contract, make a layer with it, and read the plan."""
    check_strategy(Tempered(), num_experts=64, top_k=4)
    experts = FusedMoE(
        num_experts=64, top_k=4, hidden_size=128, intermediate_size=256, routing=Tempered()
    )
    print(experts.plan)


if __name__ == "__main__":
    main()
