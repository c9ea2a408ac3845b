"""`typed-moe verify`: what passes, what is caught, and what it exits with."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from tests.cli.calls import Cli, items, number, part
from typed_moe.cli import _verify, _verify_cases, _verify_kernels
from typed_moe.cli._errors import UserError
from typed_moe.cli._strategies import strategy_classes
from typed_moe.cli._verify_kernels import (
    REFERENCE,
    Found,
    Weighing,
    kernels_of,
    triton_rounds_intermediate,
)
from typed_moe.config import FORMATS, Activation, Bf16, Format, Fp8BlockScale, Nvfp4, Swiglu
from typed_moe.kernels import (
    ExpertWeights,
    FlashInferKernel,
    KernelRequest,
    MoeArgs,
    MoeKernel,
    ReferenceKernel,
    Routing,
    TritonKernel,
    Unfinalized,
    UnfinalizedRules,
)
from typed_moe.routing import KernelRules, Refused, Renormalize, RoutingForm, SqrtSoftplus

SOME_FORMATS = (Bf16(), Fp8BlockScale(), Nvfp4())
SOME_STRATEGIES = (Renormalize(), SqrtSoftplus())


class Scaled:
    """The reference kernel, with its output two per cent too large for some formats."""

    def __init__(self, factor: float, families: tuple[str, ...]) -> None:
        self._kernel = ReferenceKernel()
        self._factor, self._families = factor, families

    @property
    def name(self) -> str:
        return "scaled"

    def rules(self, request: KernelRequest) -> KernelRules | Refused:
        return self._kernel.rules(request)

    def prepare(self, weights: ExpertWeights, request: KernelRequest) -> ExpertWeights:
        return self._kernel.prepare(weights, request)

    def __call__(self, args: MoeArgs, /) -> Tensor:
        if args.family == "bf16" and torch.isnan(torch.tensor(self._factor)):
            raise RuntimeError("CUDA error: an illegal memory access")
        return self._kernel(args) * (self._factor if args.family in self._families else 1.0)


class Swapped(Scaled):
    """The same, whose unfinalized rows have each other's weights."""

    def unfinalized_rules(
        self, request: KernelRequest, routing: type[Routing]
    ) -> UnfinalizedRules | Refused:
        return self._kernel.unfinalized_rules(request, routing)

    def unfinalized(self, args: MoeArgs, /) -> Unfinalized:
        made = self._kernel.unfinalized(args)
        return replace(made, expert_weights=made.expert_weights.flip(1))


class ScaledSource:
    """Such a kernel as something to verify."""

    name = "scaled"
    stops_before_sum = True

    def __init__(self, factor: float, *families: str) -> None:
        self._made = Scaled(factor, families)

    def rounds_intermediate(self, quant: Format) -> bool:
        del quant
        return True

    def activation(self, quant: Format) -> Activation:
        del quant
        return Swiglu()

    def kernel(self) -> MoeKernel:
        return self._made

    def weighing(self, quant: Format, form: RoutingForm, method: str) -> Weighing:
        del quant, form, method
        return Weighing.FOLLOWED

    def given(self) -> None:
        return None


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Three formats and two strategies on the reference kernel."""
    monkeypatch.setattr(_verify, "FORMATS", SOME_FORMATS)
    monkeypatch.setattr(_verify, "STRATEGIES", SOME_STRATEGIES)
    found = Found(sources=(REFERENCE,))
    monkeypatch.setattr(_verify, "kernels_of", lambda device, names: found)
    return monkeypatch


def _run(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_verify, "kernels_of", lambda device, names: found)


def test_every_strategy_and_format_is_verified() -> None:
    """A new one cannot be left out unseen."""
    names = {type(strategy) for strategy in _verify_cases.STRATEGIES}
    assert names == set(strategy_classes())
    assert {quant.name for quant in _verify_cases.FORMATS} == set(FORMATS)


def test_what_is_right_passes(cli: Cli, small: pytest.MonkeyPatch) -> None:
    """Two strategies, three formats, three placements; one of the strategies in one form."""
    done = cli("verify", "--device", "cpu", "--json")
    data = done.json()

    assert done.status == 0
    assert part(data, "counts") == {"run": 27, "passed": 27, "failed": 0, "refused": 9}
    for row in items(data, "rows"):
        if row["verdict"] == "pass":
            assert number(row, "error") < 0.002
            assert abs(number(row, "gain") - 1) < 0.001
        else:
            assert row["reason"] == "reference has no routing method for SqrtSoftplus"
    machine = part(data, "machine")
    assert machine["torch"] == torch.__version__
    assert machine["device"] == "cpu"


def test_json_has_what_the_table_counts(cli: Cli, small: pytest.MonkeyPatch) -> None:
    small.setattr(_verify, "FORMATS", (Bf16(),))
    data = cli("verify", "--device", "cpu", "--json").json()
    counts = part(data, "counts")
    verdicts = Counter(str(row["verdict"]) for row in items(data, "rows"))
    table = cli("verify", "--device", "cpu").out

    assert counts["passed"] == verdicts["pass"]
    assert counts["refused"] == verdicts["refused"]
    text = f"{counts['run']} run, {counts['failed']} failed, {counts['refused']} refused"
    assert table.splitlines()[0].startswith(f"typed-moe verify  {text}")
    assert text in table.splitlines()[-1]
    # A number in the table for every row that ran.
    errors = [word for word in table.split() if word.startswith("0.00") and len(word) == 7]
    assert len(errors) == counts["run"]


@pytest.mark.parametrize("factor", [1.02, 0.98])
def test_a_kernel_that_is_two_per_cent_off_fails(
    factor: float, cli: Cli, small: pytest.MonkeyPatch
) -> None:
    """In every format, also where rounding alone is allowed more; its rows are named."""
    families = ("fp8_block_scale", "fp4_block_scale")
    _run(Found(sources=(ScaledSource(factor, *families),)), small)
    done = cli("verify", "--device", "cpu", "--json")

    assert done.status == 1
    failed = {str(row["format"]) for row in items(done.json(), "rows") if row["verdict"] == "FAIL"}
    assert failed == {"fp8_block", "nvfp4"}
    assert part(done.json(), "counts")["failed"] == 18


def test_the_table_says_what_failed(cli: Cli, small: pytest.MonkeyPatch) -> None:
    """How many rows, and by how much."""
    small.setattr(_verify, "FORMATS", (Bf16(),))
    _run(Found(sources=(ScaledSource(0.98, "bf16"),)), small)
    table = cli("verify", "--device", "cpu")
    assert table.status == 1
    assert "Failed, 9" in table.out
    assert "the output is 0.98" in " ".join(table.out.split())


def test_unfinalized_rows_with_each_others_weights_fail(
    cli: Cli, small: pytest.MonkeyPatch
) -> None:
    """The layer's own sum is right; the caller's would not be."""
    small.setattr(_verify, "FORMATS", (Bf16(),))
    source = ScaledSource(1.0)
    source._made = Swapped(1.0, ())
    _run(Found(sources=(source,)), small)
    done = cli("verify", "--device", "cpu", "--json")

    assert done.status == 1
    assert part(done.json(), "counts")["failed"] == 9
    reasons = [str(row["reason"]) for row in items(done.json(), "rows") if row["verdict"] == "FAIL"]
    assert all("the sum of forward_unfinalized is" in reason for reason in reasons)


def test_a_kernel_that_raises_fails_its_rows(cli: Cli, small: pytest.MonkeyPatch) -> None:
    """The others run on."""
    _run(Found(sources=(ScaledSource(float("nan")),)), small)
    done = cli("verify", "--device", "cpu", "--json")

    assert done.status == 1
    rows = items(done.json(), "rows")
    reasons = {str(row["reason"]) for row in rows if row["verdict"] == "FAIL"}
    assert reasons == {"RuntimeError: CUDA error: an illegal memory access"}
    assert {row["format"] for row in rows if row["verdict"] == "pass"} == {"fp8_block", "nvfp4"}


def test_running_nothing_is_a_failure(cli: Cli, small: pytest.MonkeyPatch) -> None:
    """With what is missing and why."""
    _run(Found(sources=(), absent=(("flashinfer", "this GPU is SM90"),)), small)
    done = cli("verify", "--device", "cpu")

    assert done.status == 1
    assert "nothing ran" in done.out
    assert "this GPU is SM90" in done.out


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cuda:99", "meta", "CPU", ""])
def test_a_device_that_is_not_there(device: str, cli: Cli) -> None:
    done = cli("verify", "--device", device)

    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith(f"error: --device is '{device}'")
    assert done.err.count("\n") == 1


def test_a_kernel_that_leaves_rows_unwritten_fails(cli: Cli, small: pytest.MonkeyPatch) -> None:
    """Memory that is handed out is NaN, so that an old result cannot stand in for a new one."""

    class Unwritten(Scaled):
        @override
        def __call__(self, args: MoeArgs, /) -> Tensor:
            made = super().__call__(args)
            output = torch.empty_like(made)
            output[:-1] = made[:-1]
            return output

    small.setattr(_verify, "FORMATS", (Bf16(),))
    source = ScaledSource(1.0)
    source._made = Unwritten(1.0, ())
    _run(Found(sources=(source,)), small)
    done = cli("verify", "--device", "cpu", "--json")

    assert done.status == 1
    assert part(done.json(), "counts")["passed"] == 0


@pytest.mark.parametrize("name", ["cutlass", ""])
def test_a_kernel_that_there_is_none_of(name: str, cli: Cli) -> None:
    done = cli("verify", "--device", "cpu", "--kernel", name)

    assert done.status == 2
    allowed = "reference, flashinfer, triton, deep_gemm"
    assert done.err == f"error: --kernel is {name!r}; allowed: {allowed}\n"


def test_one_kernel_alone(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that was named and does not run here is a mistake, whatever else was named."""
    monkeypatch.setattr(_verify, "FORMATS", (Bf16(),))
    monkeypatch.setattr(_verify, "STRATEGIES", (Renormalize(),))
    done = cli("verify", "--device", "cpu", "--kernel", "reference", "--json")
    assert done.status == 0
    assert {row["kernel"] for row in items(done.json(), "rows")} == {"reference"}

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for named in (("triton",), ("reference", "triton")):
        asked = [word for name in named for word in ("--kernel", name)]
        absent = cli("verify", "--device", "cpu", *asked)
        assert (absent.status, absent.out) == (2, "")
        assert absent.err.startswith("error: --kernel is 'triton': ")
        assert "Triton" in absent.err or "CUDA" in absent.err


def test_a_gpu_has_flashinfers_kernels_and_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where FlashInfer refuses the card, Triton's still run, and the report says why alone."""
    refused = Refused("this GPU is SM90")
    monkeypatch.setattr(_verify_kernels, "installed_flashinfer", lambda device: refused)
    monkeypatch.setattr(_verify_kernels, "fused_routing_refusal", lambda device: None)
    found = kernels_of(torch.device("cuda"))

    assert [source.name for source in found.sources] == ["triton"]
    assert found.absent == (("flashinfer", "this GPU is SM90"),)
    assert isinstance(found.sources[0].kernel(), TritonKernel)
    with pytest.raises(UserError, match=r"--kernel is 'reference': .*says nothing of a GPU"):
        kernels_of(torch.device("cuda"), ("reference",))


@pytest.mark.parametrize(("capability", "fp8"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_what_the_triton_kernels_round_in_between(
    capability: tuple[int, int], fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle follows: saturation by the format's own rounding is no part of their output."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda")
    rounded = {
        _verify_cases.format_label(quant)
        for quant in _verify_cases.FORMATS
        if triton_rounds_intermediate(quant, device)
    }
    always = {"unquantized", "bf16", "fp8_per_channel", "mxfp4 x bf16", "mxint4"}
    assert rounded == always | ({"fp8_block", "fp8_per_tensor"} if fp8 else set())


def test_flashinfers_references_are_verified_where_it_is_installed(
    cli: Cli, small: pytest.MonkeyPatch
) -> None:
    """The calls to FlashInfer: all placements, and the weights that a reference drops."""
    pytest.importorskip("flashinfer")
    found = kernels_of(torch.device("cpu"))
    assert [type(source.kernel()) for source in found.sources] == [
        ReferenceKernel,
        FlashInferKernel,
    ]
    _run(Found(sources=found.sources[1:]), small)
    done = cli("verify", "--device", "cpu", "--json")

    assert done.status == 0
    rows = [row for row in items(done.json(), "rows") if row["verdict"] == "pass"]
    assert {row["entry_point"] for row in rows} == {
        "trtllm_bf16_routed_moe",
        "trtllm_fp8_block_scale_moe",
        "trtllm_fp8_block_scale_routed_moe",
        "trtllm_fp4_block_scale_moe",
        "trtllm_fp4_block_scale_routed_moe",
    }
    uniform = [row for row in rows if "1 / top_k" in str(row["reason"])]
    assert {row["entry_point"] for row in uniform} == {"trtllm_fp8_block_scale_routed_moe"}
    assert all("are not" not in str(row["reason"]) for row in uniform)
    assert {row["placement"] for row in rows} == {"whole", "tp 2", "ep 2"}


def test_weights_in_a_call_are_compared_slot_by_slot() -> None:
    """In any order of the slots, and to float32."""
    ids, weights = torch.tensor([[3, 1]]), torch.tensor([[0.75, 0.25]]).double()
    same = (torch.tensor([[1, 3]]), torch.tensor([[0.25, 0.75]]))
    assert _verify._same_routing(same, ids, weights)
    assert not _verify._same_routing((same[0], same[1] * 1.001), ids, weights)
    assert not _verify._same_routing((same[0], same[1].flip(1)), ids, weights)
    assert not _verify._same_routing((same[0] + 1, same[1]), ids, weights)
