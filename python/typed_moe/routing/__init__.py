"""Room 2: who computes which token. Strategies are values; nothing here holds a weight."""

from typed_moe.routing._biased_sigmoid import BiasedSigmoid
from typed_moe.routing._deepseek_v3 import DeepSeekV3
from typed_moe.routing._default import Default
from typed_moe.routing._grouped_softmax import GroupedSoftmax
from typed_moe.routing._llama4 import Llama4
from typed_moe.routing._minimax2 import MiniMax2
from typed_moe.routing._ops import check_inputs, float_logits, routed, top_k_ids
from typed_moe.routing._protocol import RoutingStrategy
from typed_moe.routing._records import (
    ANY_SIZE,
    BiasRule,
    BrokenRows,
    GlobalExpertIds,
    GroupLimits,
    InKernel,
    KernelRules,
    LocalExpertIds,
    MethodRules,
    PrecomputedRules,
    Refused,
    Routed,
    RoutingForm,
    RoutingShape,
    Scale,
    ScaleOwner,
    Tier,
    as_global_ids,
)
from typed_moe.routing._renormalize import Renormalize
from typed_moe.routing._renormalize_naive import RenormalizeNaive
from typed_moe.routing._results import check_routed
from typed_moe.routing._scaled_softmax import ScaledSoftmax
from typed_moe.routing._sigmoid import Sigmoid
from typed_moe.routing._sigmoid_renorm import SigmoidRenorm
from typed_moe.routing._sqrt_softplus import SqrtSoftplus
from typed_moe.routing._topk import TopK
from typed_moe.routing._topk_sigmoid import TopKSigmoid

__all__ = [
    "ANY_SIZE",
    "BiasRule",
    "BiasedSigmoid",
    "BrokenRows",
    "DeepSeekV3",
    "Default",
    "GlobalExpertIds",
    "GroupLimits",
    "GroupedSoftmax",
    "InKernel",
    "KernelRules",
    "Llama4",
    "LocalExpertIds",
    "MethodRules",
    "MiniMax2",
    "PrecomputedRules",
    "Refused",
    "Renormalize",
    "RenormalizeNaive",
    "Routed",
    "RoutingForm",
    "RoutingShape",
    "RoutingStrategy",
    "Scale",
    "ScaleOwner",
    "ScaledSoftmax",
    "Sigmoid",
    "SigmoidRenorm",
    "SqrtSoftplus",
    "Tier",
    "TopK",
    "TopKSigmoid",
    "as_global_ids",
    "check_inputs",
    "check_routed",
    "float_logits",
    "routed",
    "top_k_ids",
]
