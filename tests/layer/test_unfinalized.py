"""`FusedMoE.forward_unfinalized`: the layer's call, stopped before the weighted sum."""

from __future__ import annotations

from typing import final

import attrs
import pytest
import torch
from torch import Tensor
from typing_extensions import override

from tests import oracle
from tests.acceptance.cases import CASES, Case, sized
from tests.kernels.recorded_flashinfer import RecordedLibrary, fill
from tests.layer.build import Build, random_experts, relative_error
from typed_moe import (
    Bf16,
    DeepSeekV3,
    FlashInferKernel,
    Format,
    Fp8BlockScale,
    Fp8PerChannel,
    Fp8PerTensor,
    FusedMoE,
    Llama4,
    MxFp4,
    MxFp8,
    MxInt4,
    Nvfp4,
    Placement,
    ReferenceKernel,
    Refused,
    RenormalizeNaive,
    Routed,
    RoutingForm,
    RoutingShape,
    RoutingStrategy,
    Unfinalized,
    UnsupportedRouting,
)
from typed_moe.kernels import ExpertWeights, KernelRequest, MoeArgs
from typed_moe.routing import KernelRules
from typed_moe.runners import CallBuffers, KernelRunner

EXACT = 2e-6
"""Relative error of float32 sums in another order."""

TOKENS, HIDDEN, WIDTH = 7, 16, 12
FORMATS: tuple[Format, ...] = (
    Bf16(),
    Fp8PerTensor(),
    Fp8BlockScale(),
    MxFp8(),
    Nvfp4(),
    MxFp4(),
    Fp8PerChannel(),
    MxInt4(),
)


@pytest.mark.parametrize("form", [None, RoutingForm.PRECOMPUTED], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_sum_is_the_layers_output(case: Case, form: RoutingForm | None) -> None:
    """By the layer's own call, to the bit where two rows are added, and by float64."""
    case = sized(case, 32, min(case.top_k, 2))
    build = Build(routing=case.strategy, num_experts=32, top_k=case.top_k, routing_form=form)
    experts, bias = random_experts(32, HIDDEN, WIDTH), case.bias()
    layer = build.loaded(experts, bias)
    x, logits = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, 32)
    made = layer.forward_unfinalized(x, logits)

    assert torch.equal(made.finalize(), layer(x, logits))
    expected = oracle.layer(case.rule, experts, x, logits, bias, top_k=case.top_k, act=oracle.Act())
    assert relative_error(made.finalize(), expected) < EXACT


@pytest.mark.parametrize("form", list(RoutingForm), ids=lambda form: form.value)
def test_fused_shared_experts_are_slots_of_weight_1(form: RoutingForm) -> None:
    """Behind the routed ones."""
    case = next(one for one in CASES if one.id == "DeepSeekV3-Kimi")
    build = Build(
        routing=case.strategy, num_experts=8, top_k=3, num_fused_shared_experts=2, routing_form=form
    )
    experts, bias = random_experts(10, HIDDEN, WIDTH), torch.randn(8)
    layer = build.loaded(experts, bias)
    x, logits = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, 8)
    made = layer.forward_unfinalized(x, logits)

    assert made.expert_weights.shape == (TOKENS, 5)
    assert (made.expert_weights[:, 3:] == 1).all()
    expected = oracle.layer(
        case.rule, experts, x, logits, bias, top_k=3, act=oracle.Act(), num_shared=2
    )
    assert relative_error(made.finalize(), expected) < EXACT


@final
@attrs.frozen(kw_only=True)
class OnInput(RoutingStrategy):
    """Renormalize, with the weights on the input of several experts."""

    @property
    @override
    def name(self) -> str:
        return "OnInput"

    @property
    @override
    def apply_router_weight_on_input(self) -> bool:
        return True

    @override
    def select_experts(
        self, router_logits: Tensor, e_score_correction_bias: Tensor | None, *, shape: RoutingShape
    ) -> Routed:
        return RenormalizeNaive().select_experts(
            router_logits, e_score_correction_bias, shape=shape
        )


def test_several_weighted_inputs_of_a_token_are_its_slots() -> None:
    """Each has its own row of activations; what is left to multiply by is 1."""
    layer = Build(routing=OnInput()).loaded(random_experts(8, HIDDEN, WIDTH))
    x, logits = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, 8)
    made = layer.forward_unfinalized(x, logits)

    assert torch.equal(made.expert_weights, torch.ones(TOKENS, 2))
    assert torch.equal(made.finalize(), layer(x, logits))


@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("form", list(RoutingForm), ids=lambda form: form.value)
def test_the_ranks_sums_add_up_to_the_layer(form: RoutingForm, tokens: int) -> None:
    """Another rank's slot is -1, a row that no slot points to is NaN; neither is in the sum.

    With one token a rank has no row at all.
    """
    build = Build(routing=RenormalizeNaive(), top_k=3, routing_form=form)
    experts = random_experts(8, HIDDEN, WIDTH)
    x, logits = torch.randn(tokens, HIDDEN), torch.randn(tokens, 8)
    made: list[Unfinalized] = []
    for rank in range(4):
        place = Placement(ep_size=4, ep_rank=rank)
        layer = attrs.evolve(build, placement=place).loaded(experts)
        made.append(layer.forward_unfinalized(x, logits))

    here = [one.expanded_idx_to_permuted_idx >= 0 for one in made]
    assert bool((torch.stack(here).sum(0) == 1).all())
    assert all(bool(one.gemm2_output.isnan().any()) for one in made)
    total = torch.stack([one.finalize() for one in made]).sum(0)
    assert relative_error(total, build.loaded(experts)(x, logits).double()) < EXACT


@pytest.mark.parametrize("form", list(RoutingForm), ids=lambda form: form.value)
def test_no_tokens(form: RoutingForm) -> None:
    """Empty, in the dtypes of the plan, and nothing is launched."""
    layer, library = recorded(Build(routing=RenormalizeNaive(), top_k=3, routing_form=form), Bf16())
    made = layer.forward_unfinalized(torch.empty(0, 128).bfloat16(), torch.empty(0, 8))
    assert not library.calls
    assert made.gemm2_output.shape == (0, 128)
    assert made.expert_weights.shape == made.expanded_idx_to_permuted_idx.shape == (0, 3)
    rules = layer.plan.unfinalized
    assert not isinstance(rules, Refused)
    assert made.expert_weights.dtype is rules.weights_dtype
    assert made.finalize().shape == (0, 128)


def recorded(build: Build, quant: Format, hidden: int = 128) -> tuple[FusedMoE, RecordedLibrary]:
    """A bfloat16 layer whose calls are kept."""
    library = RecordedLibrary("0.7.2.post1")
    made = attrs.evolve(
        build,
        quant=quant,
        hidden_size=hidden,
        intermediate_size=128,
        kernel=FlashInferKernel(library),
        dtype=torch.bfloat16,
    )
    return fill(made.empty()), library


@pytest.mark.parametrize("form", list(RoutingForm), ids=lambda form: form.value)
@pytest.mark.parametrize("quant", FORMATS, ids=lambda quant: quant.name)
def test_the_call_differs_in_do_finalize_alone(quant: Format, form: RoutingForm) -> None:
    """Every other keyword is the finalized call's, which FlashInfer's references agree with."""
    layer, library = recorded(Build(routing=RenormalizeNaive(), routing_form=form), quant)
    x, logits = torch.randn(TOKENS, 128).bfloat16(), torch.randn(TOKENS, 8)
    layer(x, logits)
    layer.forward_unfinalized(x, logits)
    (entry, finalized), (same_entry, unfinalized) = library.calls
    assert same_entry == entry
    assert finalized.pop("do_finalize") is True
    assert unfinalized.pop("do_finalize") is False
    assert unfinalized.keys() == finalized.keys()
    for name, value in finalized.items():
        mine = unfinalized[name]
        for one, other in zip(_parts(value), _parts(mine), strict=True):
            if isinstance(one, Tensor) and isinstance(other, Tensor):
                assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), name
            else:
                assert one == other, name
    layer(x, logits)
    assert library.calls[-1][1]["do_finalize"] is True


def _parts(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else (value,)


def test_padded_widths_are_cut_off() -> None:
    """In a copy: what adds up counts on rows without gaps (`trtllm_moe_allreduce_fusion.cuh`)."""
    layer, library = recorded(Build(routing=RenormalizeNaive()), Nvfp4(), 160)
    made = layer.forward_unfinalized(torch.randn(3, 160).bfloat16(), torch.randn(3, 8))
    ((_, arguments),) = library.calls
    hidden = arguments["hidden_states"]
    assert isinstance(hidden, Tensor)
    assert 2 * hidden.shape[1] == 256
    assert made.gemm2_output.shape[1] == 160
    assert made.gemm2_output.is_contiguous()


def test_llama4s_weights_are_used_up_in_the_kernel() -> None:
    """It returns them all the same, and its own sum leaves them out (`trtllm_fused_moe_runner.cu`)."""
    layer, library = recorded(Build(routing=Llama4(), top_k=1), Fp8PerTensor())
    made = layer.forward_unfinalized(torch.randn(3, 128).bfloat16(), torch.randn(3, 8))
    ((_, arguments),) = library.calls
    assert arguments["use_routing_scales_on_input"] is True
    assert torch.equal(made.expert_weights, torch.ones(3, 1).bfloat16())


class Exchanged:
    """An exchange of one rank."""

    name = "nothing is exchanged"

    def check(self, placement: Placement) -> None:
        """Any."""

    def dispatch(self, hidden_states: Tensor, router_logits: Tensor) -> Exchanged:
        """Not reached."""
        raise AssertionError


@final
class SumsAlone:
    """A user's kernel with the members of `MoeKernel` and no others."""

    name = "sums alone"

    def rules(self, request: KernelRequest) -> KernelRules | Refused:
        """The reference's."""
        return ReferenceKernel().rules(request)

    def prepare(self, weights: ExpertWeights, request: KernelRequest) -> ExpertWeights:
        """As they are."""
        del request
        return weights

    def __call__(self, args: MoeArgs, /) -> Tensor:
        """The reference's."""
        return ReferenceKernel()(args)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Build(routing=RenormalizeNaive(), exchange=Exchanged()), "exchange adds the ranks' sums"),  # type: ignore[arg-type]  # dispatches nothing
        (Build(routing=RenormalizeNaive(), kernel=SumsAlone()), "sums alone has no unfinalized"),
    ],
    ids=["exchange", "kernel"],
)
def test_what_is_refused_is_in_the_plan(build: Build, reason: str) -> None:
    """Known when the layer is made, and said again at the call."""
    layer = build.loaded(random_experts(8, HIDDEN, WIDTH))
    rules = layer.plan.unfinalized
    assert isinstance(rules, Refused)
    assert reason in rules.reason
    assert dict(layer.plan.rows())["unfinalized"] == f"refused: {rules.reason}"
    with pytest.raises(UnsupportedRouting, match=reason):
        layer.forward_unfinalized(torch.randn(1, HIDDEN), torch.randn(1, 8))


def test_an_output_buffer_has_no_meaning() -> None:
    """A sum's place, and there is no sum."""
    runner = Build(routing=RenormalizeNaive()).loaded(random_experts(8, HIDDEN, WIDTH))
    made = runner.prepare_weights()
    assert isinstance(made, KernelRunner)
    x, logits = torch.randn(3, HIDDEN), torch.randn(3, 8)
    with pytest.raises(ValueError, match="output is where the sum goes"):
        made.unfinalized(x, logits, None, CallBuffers(output=torch.empty_like(x)))


def test_what_is_checked_at_every_call() -> None:
    """As for the layer's own."""
    layer = Build(routing=DeepSeekV3()).empty()
    with pytest.raises(ValueError, match=r"router_logits has shape \(3, 9\)"):
        layer.forward_unfinalized(torch.randn(3, HIDDEN), torch.randn(3, 9))
    with pytest.raises(ValueError, match="never loaded"):
        layer.forward_unfinalized(torch.randn(3, HIDDEN), torch.randn(3, 8))
    with pytest.raises(ValueError, match="routing_replay_out is"):
        layer.forward_unfinalized(
            torch.randn(3, HIDDEN), torch.randn(3, 8), routing_replay_out=torch.empty(3, 2)
        )
