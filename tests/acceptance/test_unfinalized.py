"""Acceptance test 55: what `do_finalize=False` gives says which dtype it has, and means the layer.

The FlashInfer kernels need SM100 GPUs. Here a call gets what `tests.kernels.launcher` reads in their
launchers: rows that hold their expert's id, in tiles, and weights by the oracle where the kernel
routes.
"""

from __future__ import annotations

import attrs
import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.acceptance.cases import CASES, Case, find, loosened, sized
from tests.acceptance.test_flashinfer import FORMATS, NEWEST, layer_of
from tests.kernels.launcher import mislabels, release
from tests.kernels.recorded_flashinfer import RecordedLibrary
from tests.kernels.signatures import VERSIONS, table
from tests.layer.build import Build, random_experts
from typed_moe import (
    DeepSeekV3,
    Format,
    FusedMoE,
    RoutingForm,
    Unfinalized,
    UnfinalizedRules,
    UnsupportedRouting,
)
from typed_moe.kernels import FromLogits, Precomputed, entry_point
from typed_moe.kernels.flashinfer_facts import family_of

TOKENS, EXPERTS = 6, 32
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
"""Relative error of a weight by its dtype: float32 arithmetic, or one rounding to bfloat16."""

DTYPES = (torch.float32, torch.bfloat16)


def small(case: Case) -> Case:
    """32 experts, logits of any dtype, and a bias that the grouped kernel takes."""
    case = sized(loosened(case), EXPERTS, min(case.top_k, 4))
    if isinstance(case.strategy, DeepSeekV3):
        strategy = attrs.evolve(case.strategy, correction_bias_dtype=torch.bfloat16)
        case = attrs.evolve(case, strategy=strategy)
    return case


def with_bias(layer: FusedMoE, case: Case) -> FusedMoE:
    """The layer with a bias that is exact in bfloat16, if it reads one."""
    bias = case.bias()
    if bias is not None:
        layer.load_weights([("e_score_correction_bias", bias.bfloat16().float())])
    return layer


def check_weights(
    made: Unfinalized, rules: UnfinalizedRules, case: Case, logits: Tensor, ids: Tensor
) -> None:
    """Dtypes are the plan's, and each slot's weight is the oracle's for its expert."""
    assert made.gemm2_output.dtype is rules.rows_dtype
    assert made.expert_weights.dtype is rules.weights_dtype
    assert made.expanded_idx_to_permuted_idx.dtype is torch.int32
    expected = oracle.weights_of(case.rule, logits, ids)
    if case.rule.on_input:
        expected = torch.ones_like(expected)
    rtol = CLOSE[rules.weights_dtype]
    torch.testing.assert_close(made.expert_weights.double(), expected, rtol=rtol, atol=1e-6)


def check_recorded(layer: FusedMoE, case: Case, logits: Tensor) -> None:
    """One call: every slot's row is its expert's, and the sum is that of weight * id."""
    rules = layer.plan.unfinalized
    assert isinstance(rules, UnfinalizedRules)
    made = layer.forward_unfinalized(torch.randn(TOKENS, 128).bfloat16(), logits)
    index = made.expanded_idx_to_permuted_idx
    ids = made.gemm2_output[index.long()][:, :, 0].long()
    check_weights(made, rules, case, logits, ids)
    routing = oracle.route(case.rule, logits, layer.e_score_correction_bias, case.top_k)
    same = ids.sort(1).values == routing.ids.sort(1).values
    assert bool(same[routing.decided].all())
    weights = made.expert_weights.double()
    total = made.finalize(torch.float32)
    expected = (weights * ids).sum(1, keepdim=True).expand(-1, 128)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [None, RoutingForm.PRECOMPUTED], ids=str)
@pytest.mark.parametrize("quant", FORMATS, ids=lambda quant: quant.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_acceptance_55_unfinalized_weights(
    case: Case, quant: Format, form: RoutingForm | None, dtype: torch.dtype
) -> None:
    """Every strategy and family on the newest release: dtype as declared, values as the oracle's."""
    case = small(case)
    layer = with_bias(layer_of(case, quant, RecordedLibrary(NEWEST), form), case)
    check_recorded(layer, case, torch.randn(TOKENS, EXPERTS).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [None, RoutingForm.PRECOMPUTED], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_acceptance_55_unfinalized_weights_of_the_reference(
    case: Case, form: RoutingForm | None, dtype: torch.dtype
) -> None:
    """The same of the kernel that runs, whose chosen ids are replayed."""
    case = small(case)
    build = Build(routing=case.strategy, num_experts=EXPERTS, top_k=case.top_k, routing_form=form)
    bias = case.bias()
    layer = build.loaded(random_experts(EXPERTS, 16, 12), bias)
    rules = layer.plan.unfinalized
    assert isinstance(rules, UnfinalizedRules)
    logits = torch.randn(TOKENS, EXPERTS).to(dtype)
    ids = torch.empty(TOKENS, case.top_k, dtype=torch.int16)
    made = layer.forward_unfinalized(torch.randn(TOKENS, 16), logits, routing_replay_out=ids)
    check_weights(made, rules, case, logits, ids)


def served(version: str, quant: Format, form: RoutingForm) -> bool:
    """Whether a release takes the layer at all, from its signatures."""
    family = family_of(quant)
    assert family is not None
    mode = FromLogits if form is RoutingForm.IN_KERNEL else Precomputed
    found = table(version).functions.get(entry_point(family, mode))
    if found is None or (mode is FromLogits and release(version) < (0, 6, 8)):
        return False
    return quant.name != "mxfp8" or "fp8_quantization_type" in found.parameters


@pytest.mark.parametrize("form", list(RoutingForm), ids=lambda form: form.value)
@pytest.mark.parametrize("quant", FORMATS, ids=lambda quant: quant.name)
@pytest.mark.parametrize("version", VERSIONS)
def test_acceptance_55_every_release(version: str, quant: Format, form: RoutingForm) -> None:
    """flashinfer#3595, #3644, #3925: right for both dtypes of logits, or refused with the reason."""
    case = small(find("RenormalizeNaive"))
    library = RecordedLibrary(version)
    if not served(version, quant, form):
        with pytest.raises(UnsupportedRouting):
            layer_of(case, quant, library, form)
        return
    layer = layer_of(case, quant, library, form)
    entry, rules = layer.plan.entry_point, layer.plan.unfinalized
    if isinstance(rules, UnfinalizedRules):
        for dtype in DTYPES:
            check_recorded(layer, case, torch.randn(TOKENS, EXPERTS).to(dtype))
        return
    logits = torch.randn(TOKENS, EXPERTS)
    with pytest.raises(UnsupportedRouting) as refused_call:
        layer.forward_unfinalized(torch.randn(TOKENS, 128).bfloat16(), logits)
    assert rules.reason in str(refused_call.value)
    assert not library.calls
    if "do_finalize" in table(version).functions[entry].parameters:
        assert form is RoutingForm.IN_KERNEL
        assert mislabels(entry, version)
        assert "call themselves float32" in rules.reason
    else:
        assert f"{entry} of flashinfer {version} has no do_finalize" in rules.reason


@pytest.mark.parametrize("quant", FORMATS, ids=lambda quant: quant.name)
def test_acceptance_55_a_wrong_label_is_noticed(quant: Format) -> None:
    """A release that the table trusts and that has the fault again: refused at the call."""
    library = RecordedLibrary(NEWEST)
    library.mislabels = True
    layer = layer_of(small(find("RenormalizeNaive")), quant, library, RoutingForm.IN_KERNEL)
    x = torch.randn(TOKENS, 128).bfloat16()
    layer.forward_unfinalized(x, torch.randn(TOKENS, EXPERTS).bfloat16())
    with pytest.raises(
        UnsupportedRouting, match=r"gave torch\.bfloat16 rows with torch\.float32 weig"
    ):
        layer.forward_unfinalized(x, torch.randn(TOKENS, EXPERTS))
