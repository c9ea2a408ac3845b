"""The Triton expert kernels on a CUDA device: against the oracle, and against themselves."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Literal

import attrs
import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.kernels.build import KINDS, from_logits, precomputed
from tests.kernels.watching import Watching, by_torch
from tests.layer.build import ACTIVATIONS, Build, random_experts, relative_error, separate
from tests.quantization import grids
from typed_moe import (
    Bf16,
    DeepGemmKernel,
    DeepSeekV3,
    Format,
    Fp8BlockScale,
    Fp8PerTensor,
    FusedMoE,
    MxFp4,
    MxFp8,
    Nvfp4,
    Placement,
    RenormalizeNaive,
    RoutingForm,
    TritonKernel,
)
from typed_moe.kernels import (
    Bf16MoeArgs,
    ExpertArgs,
    Fp8BlockMoeArgs,
    MoeArgs,
    MoeKernel,
    Routing,
)
from typed_moe.kernels._expert_tiles import HOPPER, HOPPER_NARROW, Operand
from typed_moe.quantization import quantize_activation, stored_error_bound

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="Triton's interpreter is on"),
]

EXPERTS, TOP_K, HIDDEN, WIDTH = 16, 4, 512, 256
TOKENS = (1, 8, 64, 300, 1024)
"""A quarter to 256 rows per expert: every tile of the table."""
Name = Literal["bf16", "fp8_block"]
BOUNDS: dict[Name, float] = {
    "bf16": stored_error_bound(Bf16()),
    "fp8_block": stored_error_bound(Fp8BlockScale()),
}


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fresh memory is NaN and large integers, so that nothing left over passes for a result."""
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    assert bool(torch.empty(7, device="cuda", dtype=torch.bfloat16).isnan().all())
    yield
    torch.use_deterministic_algorithms(mode=False)


@attrs.frozen(kw_only=True, eq=False)
class Stored:
    """A layer's stored operands, and what they are worth."""

    name: Name
    act: oracle.Act
    x: Tensor
    x_scale: Tensor | None
    first: Tensor
    first_scale: Tensor | None
    second: Tensor
    second_scale: Tensor | None
    logits: Tensor
    experts: oracle.Experts
    worth: Tensor

    def record(self, routing: Routing, tokens: int) -> MoeArgs:
        """The first `tokens` rows as an argument record on the card."""
        constant = constants(self.act)
        x = self.x[:tokens].cuda()
        if self.x_scale is None:
            return Bf16MoeArgs(
                routing=routing,
                experts=constant,
                hidden_states=x,
                gemm1_weights=self.first.cuda(),
                gemm2_weights=self.second.cuda(),
            )
        assert self.first_scale is not None
        assert self.second_scale is not None
        return Fp8BlockMoeArgs(
            routing=routing,
            experts=constant,
            hidden_states=x,
            hidden_states_scale=self.x_scale[:tokens].cuda().T,
            gemm1_weights=self.first.cuda(),
            gemm1_weights_scale=self.first_scale.cuda(),
            gemm2_weights=self.second.cuda(),
            gemm2_weights_scale=self.second_scale.cuda(),
            fp8_quantization_type="DeepSeekFp8",
        )

    def rounding(self, hidden: Tensor) -> Tensor:
        """What the format stores of the intermediate."""
        if self.name == "bf16":
            return hidden.bfloat16().double()
        groups = hidden.reshape(-1, 128)
        scale = groups.abs().amax(dim=1, keepdim=True) / 448
        return (grids.nearest(groups / scale, grids.E4M3) * scale).reshape(hidden.shape)


def constants(act: oracle.Act) -> ExpertArgs:
    """The constant half of a record, on the card."""

    def vector(value: float | None) -> Tensor | None:
        return None if value is None else torch.full((EXPERTS,), value, device="cuda")

    return ExpertArgs(
        num_experts=EXPERTS,
        top_k=TOP_K,
        intermediate_size=WIDTH,
        local_expert_offset=0,
        local_num_experts=EXPERTS,
        activation_type=KINDS[act.kind],
        gemm1_alpha=vector(act.alpha),
        gemm1_beta=vector(act.beta),
        gemm1_clamp_limit=vector(act.limit),
    )


@cache
def stored(name: Name, activation: str) -> Stored:
    """Random stored bits, and their values in float64."""
    torch.manual_seed(3)
    act = ACTIVATIONS[activation][1]
    rows, tokens = WIDTH * (2 if act.gated else 1), TOKENS[-1]
    logits = torch.randn(tokens, EXPERTS)
    x_scale = first_scale = second_scale = None
    if name == "bf16":
        x = torch.randn(tokens, HIDDEN).bfloat16()
        first = (torch.randn(EXPERTS, rows, HIDDEN) * (2 / math.sqrt(HIDDEN))).bfloat16()
        second = (torch.randn(EXPERTS, HIDDEN, WIDTH) * (2 / math.sqrt(WIDTH))).bfloat16()
        worth, worth_1, worth_2 = x.double(), first.double(), second.double()
    else:
        x, x_scale = fp8(tokens, HIDDEN), scales(tokens, HIDDEN // 128, size=2.0**-6)
        first = fp8(EXPERTS, rows, HIDDEN)
        first_scale = scales(EXPERTS, rows // 128, HIDDEN // 128, size=2.0**-10)
        second = fp8(EXPERTS, HIDDEN, WIDTH)
        second_scale = scales(EXPERTS, HIDDEN // 128, WIDTH // 128, size=2.0**-10)
        worth = x.double() * spread(x_scale, 1)
        worth_1 = first.double() * spread(first_scale, 128)
        worth_2 = second.double() * spread(second_scale, 128)
    gate, up = worth_1.chunk(2, dim=1) if act.gated else (None, worth_1)
    return Stored(
        name=name,
        act=act,
        x=x,
        x_scale=x_scale,
        first=first,
        first_scale=first_scale,
        second=second,
        second_scale=second_scale,
        logits=logits,
        experts=oracle.Experts(up=up, down=worth_2, gate=gate),
        worth=worth,
    )


def fp8(*shape: int) -> Tensor:
    """Random float8_e4m3fn values, some of them subnormal."""
    return (torch.randn(*shape) * 64).clamp(-448, 448).to(torch.float8_e4m3fn)


def scales(*shape: int, size: float) -> Tensor:
    """Float32 scales around a size."""
    return torch.exp2(torch.randn(*shape)) * size


def spread(scale: Tensor, rows: int) -> Tensor:
    """One scale per rows x 128, as one per value; float64."""
    return scale.double().repeat_interleave(rows, dim=-2).repeat_interleave(128, dim=-1)


@cache
def expected(name: Name, activation: str) -> tuple[oracle.Routing, Tensor]:
    """Routing and output of every token; rows do not depend on each other."""
    layer = stored(name, activation)
    routing = oracle.route(oracle.RULES["RenormalizeNaive"], layer.logits, None, TOP_K)
    output = oracle.moe(
        layer.experts,
        layer.worth,
        routing.ids,
        routing.weights,
        layer.act,
        rounding=layer.rounding,
    )
    return routing, output


@pytest.mark.parametrize("name", ["bf16", "fp8_block"])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation_form_and_size(name: Name, activation: str) -> None:
    """Within the format's bound of float64 on the same stored values, and the same bits again."""
    layer, (routing, output) = stored(name, activation), expected(name, activation)
    for tokens in TOKENS:
        for given in (
            precomputed(routing.ids[:tokens].cuda(), routing.weights[:tokens].cuda()),
            from_logits(layer.logits[:tokens].cuda(), "RenormalizeNaive"),
        ):
            record = layer.record(given, tokens)
            got = TritonKernel()(record)
            assert got.dtype is torch.bfloat16
            assert relative_error(got.cpu(), output[:tokens]) < BOUNDS[name], tokens
            assert torch.equal(TritonKernel()(record), got)


@pytest.mark.parametrize("activation", ["swiglu-gpt-oss", "relu2"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_fp8_converted_in_registers(activation: str, tokens: int) -> None:
    """As a card without FP8 matrix units computes it."""
    layer, (routing, output) = stored("fp8_block", activation), expected("fp8_block", activation)
    given = precomputed(routing.ids[:tokens].cuda(), routing.weights[:tokens].cuda())
    got = TritonKernel(fp8="bits")(layer.record(given, tokens))
    assert relative_error(got.cpu(), output[:tokens]) < BOUNDS["fp8_block"]


@pytest.mark.parametrize("name", ["bf16", "fp8_block"])
def test_every_tile_of_the_table_at_every_size(name: Name) -> None:
    """A tile that the table gives for another size computes the same values."""
    layer, (routing, output) = stored(name, "swiglu"), expected(name, "swiglu")
    operand: Operand = "bf16" if name == "bf16" else "fp8"
    for _, tile in (*HOPPER[operand], *HOPPER_NARROW.get(operand, ())):
        for tokens in (3, 1000):
            given = precomputed(routing.ids[:tokens].cuda(), routing.weights[:tokens].cuda())
            got = TritonKernel(tile=tile)(layer.record(given, tokens))
            assert relative_error(got.cpu(), output[:tokens]) < BOUNDS[name], tile


@pytest.mark.parametrize("name", ["bf16", "fp8_block"])
@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("mode", ["from-logits", "precomputed"])
def test_acceptance_46_shards_add_up(name: Name, ranks: int, mode: str) -> None:
    """The ranks' parts are the whole; a token with no expert of a rank gets zeros there."""
    layer, (routing, output) = stored(name, "swiglu"), expected(name, "swiglu")
    count = EXPERTS // ranks
    for tokens in (5, 200):
        ids, weights = routing.ids[:tokens].clone(), routing.weights[:tokens]
        given: Routing = precomputed(ids.cuda(), weights.cuda())
        if mode == "from-logits":
            given = from_logits(layer.logits[:tokens].cuda(), "RenormalizeNaive")
        total = torch.zeros(tokens, HIDDEN)
        for rank in range(ranks):
            here = range(rank * count, (rank + 1) * count)
            record = local(layer, given, tokens, here)
            part = TritonKernel()(record).float().cpu()
            elsewhere = ~((ids >= here.start) & (ids < here.stop)).any(1)
            assert bool((part[elsewhere] == 0).all())
            total += part
        assert relative_error(total, output[:tokens]) < BOUNDS[name]


def local(layer: Stored, given: Routing, tokens: int, here: range) -> MoeArgs:
    """The record of a rank that has these experts."""
    record = layer.record(given, tokens)
    experts = replace(record.experts, local_expert_offset=here.start, local_num_experts=len(here))
    rows = slice(here.start, here.stop)
    if isinstance(record, Bf16MoeArgs):
        return replace(
            record,
            experts=experts,
            gemm1_weights=record.gemm1_weights[rows],
            gemm2_weights=record.gemm2_weights[rows],
        )
    assert isinstance(record, Fp8BlockMoeArgs)
    return replace(
        record,
        experts=experts,
        gemm1_weights=record.gemm1_weights[rows],
        gemm1_weights_scale=record.gemm1_weights_scale[rows],
        gemm2_weights=record.gemm2_weights[rows],
        gemm2_weights_scale=record.gemm2_weights_scale[rows],
    )


def check_skipped_slots(kernel: TritonKernel | DeepGemmKernel, tokens: int, bound: float) -> None:
    """Ids of -1 add nothing; rows, weights and index add up to the call's own result."""
    layer, (routing, _) = stored("bf16", "swiglu"), expected("bf16", "swiglu")
    ids = routing.ids[:tokens].clone()
    ids[torch.rand(ids.shape) < 0.4] = -1
    ids[0] = -1
    output = oracle.moe(
        layer.experts, layer.worth[:tokens], ids, routing.weights[:tokens], layer.act
    )
    record = layer.record(precomputed(ids.cuda(), routing.weights[:tokens].cuda()), tokens)
    got = kernel(record)
    assert bool((got[0] == 0).all())
    assert relative_error(got.cpu(), output) < bound
    rows = kernel.unfinalized(record)
    assert torch.equal((rows.expanded_idx_to_permuted_idx < 0).cpu(), ids < 0)
    assert relative_error(rows.finalize().cpu(), output) < bound


@pytest.mark.parametrize("tokens", [3, 70, 1024])
def test_skipped_slots_and_unfinalized(tokens: int) -> None:
    """With the sum and before it."""
    check_skipped_slots(TritonKernel(), tokens, BOUNDS["bf16"])


def empty_layer(
    quant: Format,
    form: RoutingForm | None,
    kernel: MoeKernel | None = None,
    device: torch.device | None = None,
) -> FusedMoE:
    """A layer of DeepSeek's routing, without weights."""
    return FusedMoE(
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        routing=DeepSeekV3(num_expert_group=4, topk_group=2, routed_scaling_factor=2.5),
        quant=quant,
        routing_form=form,
        kernel=kernel,
        device=device,
        dtype=torch.bfloat16,
    )


def layer_on_card(quant: Format, form: RoutingForm | None = None) -> FusedMoE:
    """A layer that the plan gives to the Triton kernel by itself."""
    torch.manual_seed(5)
    layer = empty_layer(quant, form)
    experts = random_experts(EXPERTS, HIDDEN, WIDTH)
    weights = [("e_score_correction_bias", torch.randn(EXPERTS) * 0.05)]
    assert experts.gate is not None
    for number in range(EXPERTS):
        weights += [
            (f"{number}.gate_proj.weight", experts.gate[number]),
            (f"{number}.up_proj.weight", experts.up[number]),
            (f"{number}.down_proj.weight", experts.down[number]),
        ]
    layer.load_weights(weights)
    # On the CPU, where the reference kernel watches the intermediate; for static scales alone.
    layer.calibrate(torch.randn(64, HIDDEN).bfloat16(), torch.randn(64, EXPERTS))
    return layer.cuda()


QUANTISED: tuple[Format, ...] = (
    Fp8PerTensor(),
    Fp8BlockScale(),
    MxFp8(),
    MxFp4(),
    MxFp4(activation="mxfp8"),
    Nvfp4(),
)
FORMATS = pytest.mark.parametrize("quant", [Bf16(), *QUANTISED], ids=repr)
FORMS = pytest.mark.parametrize("form", list(RoutingForm), ids=lambda form: form.value)


@FORMATS
def test_the_plan_takes_it_where_flashinfer_refuses(quant: Format) -> None:
    """Below Blackwell the layer runs here, and the plan says why nothing else does."""
    if torch.cuda.get_device_capability() >= (10, 0):
        pytest.skip("FlashInfer's trtllm kernels may serve this card")
    plan = layer_on_card(quant).plan
    assert plan.kernel == "triton"
    assert plan.form is RoutingForm.IN_KERNEL
    assert "refused  flashinfer" in str(plan)


@FORMATS
@FORMS
@pytest.mark.parametrize("tokens", [1, 8, 300])
def test_acceptance_43_replay_equals_eager(quant: Format, form: RoutingForm, tokens: int) -> None:
    """A graph captured at T, replayed with garbage behind the real rows: the same bits."""
    layer = layer_on_card(quant, form)
    x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
    logits = torch.randn(tokens, EXPERTS, device="cuda")
    layer(x, logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x, logits)
    real = max(1, tokens - 3)
    fresh_x, fresh = torch.randn_like(x), torch.randn_like(logits)
    fresh_x[real:], fresh[real:] = torch.nan, torch.nan
    x.copy_(fresh_x)
    logits.copy_(fresh)
    captured.fill_(torch.nan)
    graph.replay()
    eager = layer(fresh_x, fresh)
    assert bool(captured[:real].isfinite().all())
    assert torch.equal(captured[:real], eager[:real])


@FORMATS
@FORMS
def test_torch_compile(quant: Format, form: RoutingForm) -> None:
    """`fullgraph=True`: the custom operator gives the eager call's values."""
    layer = layer_on_card(quant, form)
    layer.prepare_weights()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(33, HIDDEN, device="cuda").bfloat16()
    logits = torch.randn(33, EXPERTS, device="cuda")
    eager = layer(x, logits)
    got = compiled(x, logits)
    # The kernel quantises in both, and routes in both where it routes at all.
    assert form is not RoutingForm.IN_KERNEL or torch.equal(got, eager)
    assert relative_error(got, eager.double()) < (1e-6 if isinstance(quant, Bf16) else 1e-2)


@FORMS
@pytest.mark.parametrize("tokens", [1, 4, 8, 128, 129])
@pytest.mark.parametrize("quant", QUANTISED, ids=repr)
def test_activations_that_the_kernel_quantises(
    quant: Format, form: RoutingForm, tokens: int
) -> None:
    """The bits of a record that PyTorch quantised, for rows that lie apart; beside routing, or before it."""
    kernel = Watching(TritonKernel())
    layer = empty_layer(quant, form, kernel, torch.device("cuda", 0))
    layer.load_state_dict(layer_on_card(quant, form).state_dict())
    x = torch.randn(tokens, 2 * HIDDEN, device="cuda").bfloat16()[:, HIDDEN:]
    logits = torch.randn(tokens, EXPERTS, device="cuda")
    got = layer(x, logits)
    args = kernel.seen[-1]
    assert args.hidden_states.data_ptr() == x.data_ptr()
    assert torch.equal(TritonKernel()(by_torch(args)), got)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantising_in_one_launch(quant: Format, dtype: torch.dtype) -> None:
    """The values and scales that PyTorch gives on the same card, NaN and infinity among them."""
    x = (torch.randn(300, 1024) * torch.exp2(torch.randint(-12, 4, (300, 1024)))).cuda()
    x[0, :128] = 0.0
    x[1] *= 1e-30
    x[2, 5], x[3, 500], x[4, 900] = torch.nan, torch.inf, -torch.inf
    x = x.to(dtype)
    scale = torch.tensor(0.01, device="cuda")
    got = TritonKernel().quantize(x, quant, input_scale=scale)
    wanted = quantize_activation(x, quant, input_scale=scale)
    assert (got.scale is None) == (wanted.scale is None)
    if got.scale is not None and wanted.scale is not None:
        assert same_values(got.scale, wanted.scale)
    rows = torch.ones(300, dtype=torch.bool, device="cuda")
    # A NaN has no E2M1 code, and its sign may come out either way.
    rows[2] = not isinstance(quant, Nvfp4)
    assert same_values(got.data[rows], wanted.data[rows])


def same_values(one: Tensor, other: Tensor) -> bool:
    """Of one dtype; a NaN has two bit patterns."""
    if one.dtype is not other.dtype:
        return False
    return torch.equal(one.float().nan_to_num(nan=-999.0), other.float().nan_to_num(nan=-999.0))


@FORMS
@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
def test_shared_experts_and_biases_of_a_layer(form: RoutingForm, biases: bool) -> None:
    """Acceptance 49, 50: whole layers in bfloat16 against the oracle on their stored weights."""
    experts = random_experts(10, 64, 48, biases=biases)
    routing = DeepSeekV3(routed_scaling_factor=2.5)
    build = Build(
        routing=routing,
        hidden_size=64,
        intermediate_size=48,
        num_fused_shared_experts=2,
        has_bias=biases,
        routing_form=form,
        kernel=TritonKernel(),
        dtype=torch.bfloat16,
    )
    bias = torch.randn(8) * 0.1
    x, logits = torch.randn(20, 64).bfloat16(), torch.randn(20, 8)
    rule = replace(oracle.RULES["DeepSeekV3"], scale=2.5)
    act = oracle.Act()
    rounded = in_bfloat16(experts)
    wanted = oracle.layer(rule, rounded, x, logits, bias, top_k=2, act=act, num_shared=2)
    layer = loaded_on_card(build, experts, bias)
    assert relative_error(layer(x.cuda(), logits.cuda()).cpu(), wanted) < BOUNDS["bf16"]


def in_bfloat16(experts: oracle.Experts) -> oracle.Experts:
    """The experts with bfloat16 matrices; biases stay float32."""
    return replace(
        experts,
        up=experts.up.bfloat16().double(),
        down=experts.down.bfloat16().double(),
        gate=None if experts.gate is None else experts.gate.bfloat16().double(),
    )


def loaded_on_card(build: Build, experts: oracle.Experts, bias: Tensor | None) -> FusedMoE:
    """The layer on the card with these experts."""
    layer = build.empty(device="cuda")
    named = [] if bias is None else [("e_score_correction_bias", bias)]
    layer.load_weights([*separate(experts), *named])
    return layer


@FORMS
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_acceptance_44_45_46_shards_of_a_layer(form: RoutingForm, ranks: int) -> None:
    """Layers over EP ranks add up; garbage rows behind the real ones change nothing."""
    experts = random_experts(16, 64, 48)
    rounded = in_bfloat16(experts)
    # As many rows per expert as one tile is for, with the garbage and without it.
    x, logits = torch.randn(30, 64).bfloat16(), torch.randn(30, 16)
    x[24:], logits[24:] = torch.nan, torch.nan
    chosen = oracle.route(oracle.RULES["RenormalizeNaive"], logits[:24], None, 4)
    wanted = oracle.moe(rounded, x[:24].double(), chosen.ids, chosen.weights, oracle.Act())
    total = torch.zeros(24, 64)
    for rank in range(ranks):
        build = Build(
            routing=RenormalizeNaive(),
            num_experts=16,
            top_k=4,
            hidden_size=64,
            intermediate_size=48,
            placement=Placement(ep_size=ranks, ep_rank=rank),
            routing_form=form,
            kernel=TritonKernel(),
            dtype=torch.bfloat16,
        )
        layer = loaded_on_card(build, experts, None)
        part = layer(x.cuda(), logits.cuda())[:24]
        assert torch.equal(part, layer(x[:24].cuda(), logits[:24].cuda()))
        total += part.float().cpu()
    assert relative_error(total, wanted) < BOUNDS["bf16"]
