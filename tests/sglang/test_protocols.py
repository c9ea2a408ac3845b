"""What is read of SGLang's objects is there, under the names and with the fields of 0.5.23.

Another release may rename or add: a field that is gone would be an AttributeError in a server, and a new
setting of TopKConfig one that a strategy does not know of.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from importlib import import_module

import pytest
import torch

from tests.sglang.layers import Block, SglangBlock
from typed_moe.sglang import Plugin, TopKConfigLike
from typed_moe.sglang import _protocols as protocols
from typed_moe.sglang._ours import ids_of
from typed_moe.sglang._plugin import TESTED
from typed_moe.sglang._topk import ASIDE, READ

pytestmark = [pytest.mark.sglang, pytest.mark.usefixtures("sglang_host")]

MOE = "sglang.srt.layers.moe"
TRTLLM = f"{MOE}.moe_runner.flashinfer_trtllm"
RECORDS: Mapping[type, str] = {
    TopKConfigLike: f"{MOE}.topk.TopKConfig",
    protocols.RunnerConfigLike: f"{MOE}.moe_runner.base.MoeRunnerConfig",
    protocols.Fp8InfoLike: f"{TRTLLM}.FlashInferTrtllmFp8MoeQuantInfo",
    protocols.Fp4InfoLike: f"{TRTLLM}.FlashInferTrtllmFp4MoeQuantInfo",
    protocols.MxFp4InfoLike: f"{TRTLLM}.FlashInferTrtllmGenMxfp4MoeQuantInfo",
    protocols.Bf16InfoLike: f"{TRTLLM}.FlashInferTrtllmBf16MoeQuantInfo",
    protocols.BypassedLike: f"{MOE}.topk.BypassedTopKOutput",
    protocols.StandardLike: f"{MOE}.topk.StandardTopKOutput",
    protocols.DispatchLike: f"{MOE}.token_dispatcher.standard.StandardDispatchOutput",
}


def _real(path: str) -> type:
    module, name = path.rsplit(".", 1)
    found: type = getattr(import_module(module), name)
    return found


def _wanted(protocol: type) -> set[str]:
    """Fields and members of a protocol, its parents' included."""
    names: set[str] = set()
    for one in protocol.__mro__:
        if getattr(one, "_is_protocol", False):
            names |= set(inspect.get_annotations(one))
            names |= {name for name, value in vars(one).items() if isinstance(value, property)}
    return {name for name in names if not name.startswith("__")}


@pytest.mark.parametrize("protocol", RECORDS, ids=lambda one: one.__name__)
def test_every_name_that_is_read_is_there(protocol: type) -> None:
    real = _real(RECORDS[protocol])
    if dataclasses.is_dataclass(real):
        there = {field.name for field in dataclasses.fields(real)}
    else:
        there = set(getattr(real, "_fields", ()))
    there |= {name for name, value in vars(real).items() if isinstance(value, property)}
    assert _wanted(protocol) <= there


def test_no_setting_of_topk_is_unread() -> None:
    """A new one has to be translated, or to be put aside with a reason."""
    fields = {one.name for one in dataclasses.fields(_real(RECORDS[TopKConfigLike]))}
    assert fields == READ | ASIDE
    assert _wanted(TopKConfigLike) - {"num_shared_topk_slots"} == READ


def test_a_layers_attributes(trtllm: Plugin) -> None:
    layer = SglangBlock(Block(method="RenormalizeNaive", quant="bf16")).experts
    wanted = _wanted(protocols.LayerLike)
    assert {name for name in wanted if not hasattr(layer, name)} == set()


def test_a_topks_attributes(trtllm: Plugin) -> None:
    topk = SglangBlock(Block(method="RenormalizeNaive", quant="bf16")).topk
    wanted = _wanted(protocols.TopKLike)
    assert {name for name in wanted if not hasattr(topk, name)} == set()


def test_the_release_is_the_one_that_is_named() -> None:
    import sglang

    assert sglang.__version__ == TESTED


def test_method_names_are_flashinfers_but_for_the_numbers() -> None:
    """SGLang's 9 is Unspecified, FlashInfer's TopKSigmoid: only names go from one to the other."""
    from sglang.srt.layers.moe.utils import RoutingMethodType

    from typed_moe.sglang._plugin import installed_flashinfer

    flashinfer = installed_flashinfer()
    differs = {
        one.name
        for one in RoutingMethodType
        if flashinfer.number("RoutingMethodType", one.name) != int(one)
    }
    assert differs == {"Unspecified"}


def test_outputs_have_the_tensors(trtllm: Plugin) -> None:
    made = SglangBlock(Block(method="RenormalizeNaive", quant="bf16", renormalize=False))
    output = made.topk(torch.randn(3, 256), torch.randn(3, 8))
    assert output.topk_ids.shape == output.topk_weights.shape == (3, 2)


def test_an_id_and_its_weight_in_one_word() -> None:
    """As SGLang packs them: the id above, bfloat16 bits below, the sign bit set too."""
    ids = torch.tensor([[3, 200], [0, 255]])
    weights = torch.tensor([[0.5, -1.25], [1.0, 0.0078125]])
    low = weights.bfloat16().view(torch.int16).int() & 0xFFFF
    output = _real(f"{MOE}.topk.PackedTopKOutput")((ids.int() << 16) | low, None)
    found = ids_of(output)
    assert torch.equal(found[0], ids.int())
    assert torch.equal(found[1], weights)
