"""The Triton expert kernels' logic in Triton's interpreter, on small shapes. No GPU.

`tests/gpu/test_triton_experts.py` has the same kernels compiled, `tests/layer/test_triton_plan.py`
what they take.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from typing import Literal

import attrs
import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.kernels import build as records
from tests.kernels.build import Record, RecordName, Sizes, from_logits, precomputed
from tests.kernels.watching import Watching, by_torch
from tests.layer.build import ACTIVATIONS, Build, random_experts, relative_error
from typed_moe import (
    Bf16,
    DeepSeekV3,
    Format,
    Fp8BlockScale,
    Fp8PerTensor,
    Llama4,
    MxFp4,
    MxFp8,
    Nvfp4,
    Placement,
    ReferenceKernel,
    Renormalize,
    RenormalizeNaive,
    RoutingForm,
    RoutingStrategy,
    Swiglu,
    TritonKernel,
)
from typed_moe.kernels import Fp8BlockMoeArgs, FromLogits, MoeArgs, _quantizing, triton_experts
from typed_moe.kernels._expert_tiles import ExpertTile, GemmTile
from typed_moe.kernels.args import given_scale
from typed_moe.quantization import (
    quantize_activation,
    relative_error_bound,
    stored_error_bound,
)

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed here"
    ),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is not on"
    ),
    # NumPy says that exp(200) is infinite; so it is on a card, which does not say it.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]
BF16 = stored_error_bound(Bf16())
FP8 = stored_error_bound(Fp8BlockScale())
QUANTISED: tuple[Format, ...] = (
    Fp8PerTensor(),
    Fp8BlockScale(),
    MxFp8(),
    MxFp4(),
    MxFp4(activation="mxfp8"),
    Nvfp4(),
)
PER_TENSOR = stored_error_bound(Fp8PerTensor())
FORMS = pytest.mark.parametrize("form", list(RoutingForm), ids=lambda form: form.value)
SMALL = ExpertTile(
    block_m=16,
    first=GemmTile(block_n=16, block_k=32, warps=4, stages=2),
    second=GemmTile(block_n=32, block_k=16, warps=4, stages=2),
)
"""Several programs and steps at the widths below, which are no multiples of its blocks."""
GROUPED = ExpertTile(
    block_m=16,
    first=GemmTile(block_n=128, block_k=128, warps=4, stages=2, group_m=4),
    second=GemmTile(block_n=64, block_k=128, warps=4, stages=2, group_m=3),
)
"""A first product that quantises a whole group of its columns."""
PAIRED = ExpertTile(
    block_m=16,
    first=GemmTile(block_n=32, block_k=256, warps=4, stages=2),
    second=GemmTile(block_n=64, block_k=256, warps=4, stages=2),
)
"""Two steps of FP8 loaded together."""
PERSISTENT = ExpertTile(
    block_m=128,
    first=GemmTile(block_n=128, block_k=128, warps=8, stages=4, persistent=True),
    second=GemmTile(block_n=128, block_k=128, warps=8, stages=4, persistent=True),
)
"""On anything but a Hopper the portable kernels, half as wide."""
DESCRIBED = attrs.evolve(
    GROUPED,
    first=attrs.evolve(GROUPED.first, block_n=64, tma=True),
    second=attrs.evolve(GROUPED.second, tma=True),
    block_m=32,
    second_block_m=16,
)
"""Both products read their matrices through tensor descriptors, the second one in half blocks."""
HIDDEN, WIDTH = 40, 24
EXPERTS, TOKENS = 4, 9
"""Of records: the interpreter's time is by blocks of slots, and each expert has its own at any number of tokens."""


def record(name: RecordName, act: oracle.Act) -> Record:
    """Random stored values, in as few blocks as show everything."""
    return records.record(name, act, Sizes(experts=EXPERTS, tokens=TOKENS))


def rounded(experts: oracle.Experts) -> oracle.Experts:
    """The experts with bfloat16 matrices; biases stay float32."""
    return replace(
        experts,
        up=experts.up.bfloat16().double(),
        down=experts.down.bfloat16().double(),
        gate=None if experts.gate is None else experts.gate.bfloat16().double(),
    )


def build(routing: RoutingStrategy, form: RoutingForm) -> Build:
    """A bfloat16 layer on the Triton kernel."""
    return Build(
        routing=routing,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        routing_form=form,
        kernel=TritonKernel(tile=SMALL),
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation(name: str) -> None:
    """With expert biases, against float64 on the stored weights."""
    activation, act = ACTIVATIONS[name]
    experts = random_experts(8, HIDDEN, WIDTH, gated=act.gated, biases=True)
    layer = attrs.evolve(
        build(RenormalizeNaive(), RoutingForm.PRECOMPUTED), activation=activation, has_bias=True
    ).loaded(experts)
    x, logits = torch.randn(9, HIDDEN).bfloat16(), torch.randn(9, 8)
    rule = oracle.RULES["RenormalizeNaive"]
    expected = oracle.layer(rule, rounded(experts), x, logits, None, top_k=2, act=act)

    assert relative_error(layer(x, logits), expected) < BF16


@pytest.mark.parametrize("kind", ["swiglu", "relu2"])
def test_descriptors(kind: oracle.Kind) -> None:
    """Tiles that reach over the edges of the matrices, of the last expert's among them."""
    made = record("bf16", oracle.Act(kind=kind))
    ids, weights = chosen()
    expected = oracle.moe(made.experts, made.x, ids, weights, made.act)
    args = made.make(precomputed(ids, weights))
    gemm = GemmTile(block_n=128, block_k=64, warps=4, stages=2, tma=True)
    tile = ExpertTile(block_m=16, first=gemm, second=gemm)
    got = TritonKernel(tile=tile)(args)

    assert relative_error(got, expected) < BF16


@FORMS
@pytest.mark.parametrize("name", ["DeepSeekV3", "Renormalize", "Llama4"])
def test_routing_in_both_forms(name: str, form: RoutingForm) -> None:
    """Groups with a bias and a factor; a softmax; and the weight on the expert's input."""
    strategies: dict[str, tuple[RoutingStrategy, oracle.Rule]] = {
        "DeepSeekV3": (
            DeepSeekV3(num_expert_group=4, topk_group=2, routed_scaling_factor=2.5),
            replace(oracle.RULES["DeepSeekV3"], num_expert_group=4, topk_group=2, scale=2.5),
        ),
        "Renormalize": (Renormalize(), oracle.RULES["Renormalize"]),
        "Llama4": (Llama4(), oracle.RULES["Llama4"]),
    }
    strategy, rule = strategies[name]
    top_k = 1 if name == "Llama4" else 2
    bias = torch.randn(8) * 0.1 if rule.biased else None
    experts = random_experts(8, HIDDEN, WIDTH)
    layer = attrs.evolve(build(strategy, form), top_k=top_k).loaded(experts, bias)
    x, logits = torch.randn(9, HIDDEN).bfloat16(), torch.randn(9, 8)
    expected = oracle.layer(rule, rounded(experts), x, logits, bias, top_k=top_k, act=oracle.Act())

    assert layer.plan.form is form
    assert relative_error(layer(x, logits), expected) < BF16


@FORMS
def test_acceptance_49_50_fused_shared_experts(form: RoutingForm) -> None:
    """Every token goes to each shared expert once, with weight 1, unscaled."""
    experts, bias = random_experts(10, HIDDEN, WIDTH), torch.randn(8) * 0.1
    made = attrs.evolve(
        build(DeepSeekV3(routed_scaling_factor=2.5), form), num_fused_shared_experts=2
    )
    x, logits = torch.randn(9, HIDDEN).bfloat16(), torch.randn(9, 8)
    rule = replace(oracle.RULES["DeepSeekV3"], scale=2.5)
    expected = oracle.layer(
        rule, rounded(experts), x, logits, bias, top_k=2, act=oracle.Act(), num_shared=2
    )

    assert relative_error(made.loaded(experts, bias)(x, logits), expected) < BF16


@FORMS
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_acceptance_46_shards_add_up(ranks: int, form: RoutingForm) -> None:
    """The ranks' parts are the whole layer, and no part is nothing."""
    experts = random_experts(8, HIDDEN, WIDTH)
    x, logits = torch.randn(9, HIDDEN).bfloat16(), torch.randn(9, 8)
    rule = oracle.RULES["RenormalizeNaive"]
    expected = oracle.layer(rule, rounded(experts), x, logits, None, top_k=2, act=oracle.Act())
    total = torch.zeros(9, HIDDEN)
    for rank in range(ranks):
        place = Placement(ep_size=ranks, ep_rank=rank)
        part = attrs.evolve(build(RenormalizeNaive(), form), placement=place).loaded(experts)
        got = part(x, logits)
        assert float(got.norm()) > 0
        total += got.float()

    assert relative_error(total, expected) < BF16


def chosen(tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Distinct ids, some of them -1, and weights."""
    ids = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(tokens)])
    ids[torch.rand(ids.shape) < 0.2] = -1
    return ids, torch.rand(tokens, 2)


@pytest.mark.parametrize("fp8", ["native", "bits"])
@pytest.mark.parametrize(
    "tile",
    [None, GROUPED, PAIRED, DESCRIBED, PERSISTENT],
    ids=["between", "as written", "paired steps", "by descriptor", "persistent elsewhere"],
)
@pytest.mark.parametrize("kind", ["swiglu", "relu2"])
def test_fp8_blocks(
    fp8: Literal["native", "bits"], tile: ExpertTile | None, kind: oracle.Kind
) -> None:
    """Stored bits against what they are worth, the intermediate quantised in either place."""
    made = record("fp8_block", oracle.Act(kind=kind))
    ids, weights = chosen()
    expected = oracle.moe(made.experts, made.x, ids, weights, made.act, rounding=made.rounding)
    got = TritonKernel(fp8=fp8, tile=tile)(made.make(precomputed(ids, weights)))

    assert relative_error(got, expected) < FP8
    # Converted in registers, the intermediate is not rounded to FP8.
    if fp8 == "bits":
        exact = oracle.moe(made.experts, made.x, ids, weights, made.act)
        assert relative_error(got, exact) < BF16


@pytest.mark.parametrize("fp8", ["native", "bits"])
@pytest.mark.parametrize(
    "tile", [None, GROUPED, PAIRED], ids=["table", "several steps", "paired steps"]
)
@pytest.mark.parametrize("kind", ["swiglu", "relu2"])
def test_fp8_per_tensor(
    fp8: Literal["native", "bits"], tile: ExpertTile | None, kind: oracle.Kind
) -> None:
    """Output scales on the products; the intermediate divided by its static scale, and saturated."""
    made = record("fp8_per_tensor", oracle.Act(kind=kind))
    ids, weights = chosen()
    expected = oracle.moe(made.experts, made.x, ids, weights, made.act, rounding=made.rounding)
    got = TritonKernel(fp8=fp8, tile=tile)(made.make(precomputed(ids, weights)))

    if fp8 == "native":
        assert relative_error(got, expected) < PER_TENSOR
    # Converted in registers, the intermediate is neither rounded to FP8 nor saturated.
    else:
        exact = oracle.moe(made.experts, made.x, ids, weights, made.act)
        assert relative_error(got, exact) < BF16


@pytest.mark.parametrize("tile", [None, GROUPED], ids=["table", "several steps"])
@pytest.mark.parametrize("kind", ["swiglu", "relu2"])
@pytest.mark.parametrize("name", ["mxfp8", "mxfp4_bf16", "mxfp4_mxfp8", "nvfp4"])
def test_scales_for_a_few_values_of_the_sum(
    name: RecordName, tile: ExpertTile | None, kind: oracle.Kind
) -> None:
    """Stored bits against what they are worth, with the intermediate in bfloat16: only its bound."""
    made = record(name, oracle.Act(kind=kind))
    ids, weights = chosen()
    exact = oracle.moe(made.experts, made.x, ids, weights, made.act)
    got = TritonKernel(tile=tile)(made.make(precomputed(ids, weights)))

    assert relative_error(got, exact) < BF16


@pytest.mark.parametrize("quant", QUANTISED, ids=repr)
def test_quantising_in_one_launch(quant: Format) -> None:
    """The values that PyTorch gives: subnormals, zeros, one value, tiny and huge groups, ties."""
    x = torch.randn(6, 384) * torch.exp2(torch.randint(-12, 12, (6, 384)))
    x[0, :128] = 0.0
    x[1, :128] = 0.0
    x[1, 5] = 3.0
    x[2] *= 1e-30
    x[3, 128:256] = 1e-44
    x[4] = torch.arange(384) / 4 - 48
    scale = torch.tensor(0.0625)
    for values in (x, x.bfloat16(), x.repeat(1, 2)[:, :384]):
        got = TritonKernel().quantize(values, quant, input_scale=scale)
        expected = quantize_activation(values, quant, input_scale=scale)
        for one, other in (
            (got.data, expected.data),
            (got.scale, expected.scale),
            (got.global_scale, expected.global_scale),
        ):
            assert (one is None) == (other is None)
            assert one is None or other is None or one.dtype is other.dtype
            # The interpreter's rounding to E4M3 loses the sign of a zero.
            assert one is None or other is None or torch.equal(one.float(), other.float())


@pytest.mark.parametrize("tokens", [3, 9])
@pytest.mark.parametrize("quant", QUANTISED, ids=repr)
def test_activations_that_the_kernel_quantises(
    quant: Format, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of a record that PyTorch quantised: beside routing in its launch, or in one of its own.

    The columns are more than a program's, and no multiple of it. Three tokens are routed and sorted by one
    program, nine by several.
    """
    monkeypatch.setattr(_quantizing, "PART", 256)
    kernel, width = Watching(TritonKernel(tile=GROUPED)), 384
    layer = attrs.evolve(
        build(RenormalizeNaive(), RoutingForm.IN_KERNEL),
        quant=quant,
        hidden_size=width,
        intermediate_size=128,
        kernel=kernel,
    ).loaded(random_experts(8, width, 128))
    x, logits = torch.randn(tokens, 2 * width).bfloat16()[:, :width], torch.randn(tokens, 8)
    layer.calibrate(x, logits)
    beside = layer(x, logits)
    args = kernel.seen[-1]

    assert args.hidden_states.data_ptr() == x.data_ptr()
    assert torch.equal(kernel.kernel(by_torch(args)), beside)
    monkeypatch.setattr(triton_experts, "_MOST_BESIDE", 0)
    assert torch.equal(kernel.kernel(args), beside)
    with pytest.raises(ValueError, match="which this one does not do"):
        ReferenceKernel()(args)


@pytest.mark.parametrize("quant", QUANTISED, ids=repr)
def test_a_layer_of_every_format(quant: Format) -> None:
    """Far from float64 by what the format costs at most, and from the reference on the same state by less.

    The custom operator of torch.compile is given the activations as they are too.
    """
    experts = random_experts(4, 256, 128, biases=True)
    made = attrs.evolve(
        build(RenormalizeNaive(), RoutingForm.IN_KERNEL),
        num_experts=4,
        quant=quant,
        hidden_size=256,
        intermediate_size=128,
        has_bias=True,
        kernel=TritonKernel(),
    )
    x, logits = torch.randn(5, 256).bfloat16(), torch.randn(5, 4)
    layer = made.loaded(experts)
    layer.calibrate(x, logits)
    rule = oracle.RULES["RenormalizeNaive"]
    expected = oracle.layer(rule, experts, x, logits, None, top_k=2, act=oracle.Act())
    reference = attrs.evolve(made, kernel=ReferenceKernel()).empty()
    reference.load_state_dict(layer.state_dict())
    eager = layer(x, logits)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    assert torch.equal(compiled(x, logits), eager)
    assert relative_error(eager, expected) < relative_error_bound(quant, Swiglu())
    assert relative_error(eager, reference(x, logits).double()) < stored_error_bound(quant)


@pytest.mark.parametrize("on_input", [False, True], ids=["shared", "on input"])
@pytest.mark.parametrize("quant", [MxFp8(), MxFp4(), Nvfp4()], ids=lambda quant: quant.name)
def test_widths_that_are_no_multiple_of_a_step(quant: Format, on_input: bool) -> None:
    """Groups behind the last one, half columns in a tile; shared experts, and the weight on the input."""
    strategy = Llama4() if on_input else RenormalizeNaive()
    top_k, shared = (1, 0) if on_input else (2, 1)
    experts = random_experts(8 + shared, 96, 160, biases=True)
    made = attrs.evolve(
        build(strategy, RoutingForm.IN_KERNEL),
        top_k=top_k,
        quant=quant,
        hidden_size=96,
        intermediate_size=160,
        num_fused_shared_experts=shared,
        has_bias=True,
        kernel=TritonKernel(tile=GROUPED),
    )
    x, logits = torch.randn(9, 96).bfloat16(), torch.randn(9, 8)
    layer = made.loaded(experts)
    layer.calibrate(x, logits)
    reference = attrs.evolve(made, kernel=ReferenceKernel()).empty()
    reference.load_state_dict(layer.state_dict())
    rule, act = oracle.RULES[strategy.name], oracle.Act()
    expected = oracle.layer(rule, experts, x, logits, None, top_k=top_k, act=act, num_shared=shared)
    got = layer(x, logits)

    assert relative_error(got, expected) < relative_error_bound(quant, Swiglu())
    assert relative_error(got, reference(x, logits).double()) < stored_error_bound(quant)


def test_nan_in_mxfp8() -> None:
    """A scale that says NaN and a value that does reach their own token, and no other."""
    made = record("mxfp8", oracle.Act())
    args = made.make(precomputed(*chosen()))
    assert isinstance(args, Fp8BlockMoeArgs)
    x, scale = args.hidden_states.clone(), given_scale(args).clone()
    x[2, :32], scale[2] = 0.0, 255
    x.view(torch.uint8)[3, 7] = 0x7F
    got = TritonKernel()(
        replace(
            args,
            routing=precomputed(torch.tensor([[0, 1]] * TOKENS), torch.ones(TOKENS, 2)),
            hidden_states=x,
            hidden_states_scale=scale,
        )
    )
    assert bool(got[2:4].isnan().all())
    assert bool(got[:2].isfinite().all())
    assert bool(got[4:].isfinite().all())


def test_unfinalized_rows_add_up_to_the_call() -> None:
    """Skipped slots have no row; the sum in PyTorch is the kernel's own, but for its rounding."""
    made = record("bf16", oracle.Act())
    ids, weights = chosen()
    args = made.make(precomputed(ids, weights))
    rows = TritonKernel().unfinalized(args)

    assert torch.equal(rows.expanded_idx_to_permuted_idx < 0, ids < 0)
    assert torch.equal(rows.finalize(), TritonKernel()(args))


def test_output_and_replay_are_written() -> None:
    """The caller's own tensors."""
    made = record("bf16", oracle.Act())
    logits = torch.randn(TOKENS, EXPERTS)
    routing = from_logits(logits)
    assert isinstance(routing, FromLogits)
    replay = torch.full((TOKENS + 2, 2), -7, dtype=torch.int16)
    args = made.make(replace(routing, routing_replay_out=replay))
    output = torch.full(made.x.shape, torch.nan, dtype=torch.bfloat16)
    expected = TritonKernel()(args)

    assert TritonKernel()(replace(args, output=output)) is output
    assert torch.equal(output, expected)
    assert torch.equal(replay[:TOKENS].long(), logits.topk(2).indices)
    assert bool((replay[TOKENS:] == -7).all())


def test_a_record_of_another_format() -> None:
    """A record made by hand is looked at too."""
    args: MoeArgs = record("mxint4", oracle.Act()).make(precomputed(*chosen()))
    with pytest.raises(TypeError, match="this is MxInt4MoeArgs with"):
        TritonKernel()(args)


def test_no_tokens() -> None:
    """T = 0 gives an empty result."""
    made = build(RenormalizeNaive(), RoutingForm.IN_KERNEL).loaded(random_experts(8, HIDDEN, WIDTH))
    assert made(torch.empty(0, HIDDEN).bfloat16(), torch.empty(0, 8)).shape == (0, HIDDEN)


def test_torch_compile() -> None:
    """One operator in one graph, and the eager call's bits."""
    experts = random_experts(8, HIDDEN, WIDTH)
    layer = build(RenormalizeNaive(), RoutingForm.IN_KERNEL).loaded(experts)
    x, logits = torch.randn(5, HIDDEN).bfloat16(), torch.randn(5, 8)
    eager = layer(x, logits)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, logits), eager)
