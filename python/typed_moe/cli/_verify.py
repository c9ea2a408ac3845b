"""`typed-moe verify`: everything that this machine can run, against a float64 oracle."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal, final

import attrs
import torch
from torch import Tensor

from typed_moe.cli._bench_clock import poisoned
from typed_moe.cli._errors import UserError
from typed_moe.cli._progress import Steps
from typed_moe.cli._verify_cases import (
    FORMATS,
    PLACEMENTS,
    STRATEGIES,
    Inputs,
    draw_inputs,
    format_label,
    settings_label,
    top_k_of,
)
from typed_moe.cli._verify_expected import (
    StoredRank,
    dtype_of,
    expected_output,
    make_layer,
    oracle_routing,
    store,
)
from typed_moe.cli._verify_kernels import KernelSource, Weighing, kernels_of
from typed_moe.config import Format
from typed_moe.layer import FusedMoE
from typed_moe.quantization import stored_error_bound
from typed_moe.routing import BiasRule, Refused, RoutingForm, RoutingStrategy

GAIN_BOUND = 0.01
"""How far <output, oracle> / <oracle, oracle> may be from 1.

Rounding errors have no sign in common, so they leave this at 1 where the relative error is some
per cent; a scale that is off, by rounding it or by applying it twice, moves it and nothing else.
"""

Verdict = Literal["pass", "FAIL", "refused"]


@final
@attrs.frozen(kw_only=True)
class Row:
    """One strategy, format, form and placement on one kernel.

    Attributes:
        strategy: its name, and its groups.
        format: of the layer.
        form: who routes.
        placement: `whole`, or the ranks whose outputs were added up.
        kernel: that ran or refused.
        entry_point: of the plan; None where there is no plan.
        activation: of the experts.
        error: ||output - oracle|| / ||oracle||.
        gain: <output, oracle> / <oracle, oracle>.
        bound: on the error.
        verdict: what became of it.
        reason: of a refusal or a failure; of a pass, what it does not show.
    """

    strategy: str
    format: str
    form: str
    placement: str
    kernel: str
    activation: str
    bound: float
    verdict: Verdict
    entry_point: str | None = None
    error: float | None = None
    gain: float | None = None
    reason: str = ""


@final
@attrs.frozen(kw_only=True)
class VerifyReport:
    """Everything that `verify` prints."""

    device: torch.device
    rows: tuple[Row, ...]
    absent: tuple[tuple[str, str], ...]
    seconds: float

    def count(self, verdict: Verdict) -> int:
        """Rows that ended so."""
        return sum(row.verdict == verdict for row in self.rows)

    @property
    def run(self) -> int:
        """Rows in which a kernel ran, or should have."""
        return self.count("pass") + self.count("FAIL")

    @property
    def passed(self) -> bool:
        """Something ran and nothing failed."""
        return self.count("pass") > 0 and self.count("FAIL") == 0


def read_device(name: str | None) -> torch.device:
    """The device that was named; a GPU, where there is one and none was named.

    Raises:
        UserError: there is no such device.
    """
    cuda = torch.cuda.is_available()
    if name is None:
        return torch.device("cuda" if cuda else "cpu")
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count() if cuda else 0
    known = name == "cpu" or (kind == "cuda" and (name == "cuda" or index.isdecimal()))
    if not known:
        raise UserError(f"--device is {name!r}; allowed: cpu, cuda, or cuda and a number (cuda:0)")
    if kind == "cuda" and int(index or 0) >= count:
        raise UserError(
            f"--device is {name!r} and this torch ({torch.__version__}) sees {count} CUDA devices; "
            "choose --device cpu, or install a torch build for the GPU"
        )
    return torch.device(name)


@torch.no_grad()
def verify(device: torch.device, steps: Steps, kernels: tuple[str, ...] = ()) -> VerifyReport:
    """Run everything that the plans allow on a device.

    Raises:
        UserError: a kernel that there is none of.
    """
    begin = time.perf_counter()
    found = kernels_of(device, kernels)
    inputs = draw_inputs()
    rows: list[Row] = []
    for source in found.sources:
        with steps.step(f"verify {source.name}", total=len(FORMATS)) as step:
            for quant in FORMATS:
                rows += _format(source, quant, device, inputs)
                step.advance()
    return VerifyReport(
        device=device,
        rows=tuple(rows),
        absent=found.absent,
        seconds=time.perf_counter() - begin,
    )


def _format(
    source: KernelSource, quant: Format, device: torch.device, inputs: Inputs
) -> Iterator[Row]:
    for placement, places in PLACEMENTS.items():
        ranks = store(quant, source.activation(quant), places, inputs)
        for form in RoutingForm:
            for strategy in STRATEGIES:
                case = _Case(
                    source=source,
                    strategy=strategy,
                    quant=quant,
                    form=form,
                    placement=placement,
                    ranks=ranks,
                    device=device,
                    inputs=inputs,
                )
                yield case.row()


@final
@attrs.frozen(kw_only=True, eq=False)
class _Case:
    """What becomes one row."""

    source: KernelSource
    strategy: RoutingStrategy
    quant: Format
    form: RoutingForm
    placement: str
    ranks: tuple[StoredRank, ...]
    device: torch.device
    inputs: Inputs

    def row(self) -> Row:
        """Plan, run, compare."""
        empty = Row(
            strategy=settings_label(self.strategy),
            format=format_label(self.quant),
            form=self.form.value,
            placement=self.placement,
            kernel=self.source.name,
            activation=repr(self.source.activation(self.quant)),
            bound=stored_error_bound(self.quant),
            verdict="refused",
        )
        weighing = self.source.weighing(self.quant, self.form, self.strategy.name)
        try:
            layers = self._layers()
        except ValueError as error:
            return attrs.evolve(empty, reason=_reason(error, self.form))
        empty = attrs.evolve(empty, entry_point=layers[0].plan.entry_point)
        if isinstance(weighing, Refused):
            return attrs.evolve(empty, reason=weighing.reason)
        try:
            output = self._run(layers)
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises is its row's verdict
            return attrs.evolve(empty, verdict="FAIL", reason=f"{type(error).__name__}: {error}")
        return self._judge(empty, output, weighing)

    def _layers(self) -> list[FusedMoE]:
        """One for each rank, empty."""
        return [
            make_layer(
                self.strategy,
                top_k=top_k_of(self.strategy),
                quant=self.quant,
                activation=self.source.activation(self.quant),
                placement=place,
                kernel=self.source.kernel(),
                form=self.form,
                device=self.device,
            )
            for place in PLACEMENTS[self.placement]
        ]

    def _run(self, layers: list[FusedMoE]) -> Tensor:
        """(T, H) float64 on the CPU, the sum over the ranks."""
        x = self.inputs.hidden_states.to(self.device, dtype_of(self.quant))
        logits = self.inputs.logits.to(self.device)
        total = torch.zeros(x.shape, dtype=torch.float64)
        for layer, rank in zip(layers, self.ranks, strict=True):
            state = dict(rank.state)
            if self.strategy.bias is BiasRule.REQUIRED:
                state["e_score_correction_bias"] = self.inputs.bias
            layer.load_state_dict(state)
            with poisoned():
                output = layer(x, logits)
            if self.source.stops_before_sum and not isinstance(layer.plan.unfinalized, Refused):
                self._compare_unfinalized(layer, x, logits, output)
            total += output.to("cpu", torch.float64)
        return total

    def _compare_unfinalized(
        self, layer: FusedMoE, x: Tensor, logits: Tensor, output: Tensor
    ) -> None:
        """Raise where the layer's own sum and that of its unfinalized rows are not the same."""
        with poisoned():
            total = layer.forward_unfinalized(x, logits).finalize(torch.float32)
        off, size = float((total - output.float()).norm()), float(output.float().norm())
        allowed = stored_error_bound(self.quant) * size
        # Written so that NaN fails, and a rank without a token does not.
        if not off <= allowed:
            raise ArithmeticError(
                f"the sum of forward_unfinalized is {off:.4g} off the layer's output, whose norm is "
                f"{size:.4g}; allowed: {allowed:.4g}"
            )

    def _judge(self, row: Row, output: Tensor, weighing: Weighing) -> Row:
        routing = oracle_routing(self.strategy, self.inputs, top_k_of(self.strategy))
        on_input = self.strategy.apply_router_weight_on_input
        expected = expected_output(
            self.ranks,
            self.quant,
            self.inputs,
            routing,
            weigh_input=self.form if on_input else None,
            uniform=weighing is Weighing.UNIFORM and not on_input,
            rounded=self.source.rounds_intermediate(self.quant),
        )
        error = float((output - expected).norm() / expected.norm())
        gain = float((output * expected).sum() / (expected * expected).sum())
        # Written so that NaN fails.
        fine = error <= row.bound and abs(gain - 1) <= GAIN_BOUND
        reason = "" if fine else _failure(error, gain, row.bound)
        if fine and weighing is Weighing.UNIFORM and not on_input:
            given = self.source.given()
            reason = "the reference weighs every slot with 1 / top_k"
            if given is not None:
                fine = _same_routing(given, routing.ids, routing.weights)
                reason += (
                    f"; the ids and weights in the call are {'' if fine else 'not '}the oracle's"
                )
        return attrs.evolve(
            row,
            error=error if error == error else None,  # noqa: PLR0124 - JSON has no NaN
            gain=gain if gain == gain else None,  # noqa: PLR0124
            verdict="pass" if fine else "FAIL",
            reason=reason,
        )


def _same_routing(given: tuple[Tensor, Tensor], ids: Tensor, weights: Tensor) -> bool:
    """Whether two routings are the same, in whatever order a row has them."""
    mine = given[0].long().cpu().sort(dim=1)
    theirs = ids.sort(dim=1)
    if not torch.equal(mine.values, theirs.values):
        return False
    told = given[1].to("cpu", torch.float64).gather(1, mine.indices)
    return torch.allclose(told, weights.gather(1, theirs.indices), rtol=1e-5, atol=1e-6)


def _failure(error: float, gain: float, bound: float) -> str:
    """What is beyond which bound."""
    return (
        f"the error is {error:.4g}, allowed: {bound:.4g}; the output is {gain:.4g} times the "
        f"oracle's, allowed: 1 +- {GAIN_BOUND}"
    )


def _reason(error: ValueError, form: RoutingForm) -> str:
    """The candidate's line for the form that was asked for, out of a message that lists both."""
    mark = " routing: "
    lines = [line for line in str(error).splitlines() if mark in line]
    asked = [line for line in lines if f"{form.value}{mark}" in line]
    if not lines:
        return " ".join(str(error).split())
    return (asked or lines)[0].partition(mark)[2]
