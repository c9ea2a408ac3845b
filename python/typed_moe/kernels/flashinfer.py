"""FlashInfer's trtllm fused MoE kernels, behind the argument records.

This module does not import flashinfer: it is given a `FlashInferLibrary`, and
`installed_flashinfer` finds the installed one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import final
from weakref import WeakKeyDictionary

import attrs
import torch
from torch import Tensor
from typing_extensions import override

from typed_moe.config import Swiglu, SwigluStep
from typed_moe.errors import UnsupportedRouting
from typed_moe.kernels import flashinfer_facts as facts
from typed_moe.kernels._activation_arguments import activation_arguments
from typed_moe.kernels._flashinfer_arguments import (
    NEUTRAL,
    ROUTED_METHOD,
    Arguments,
    constant_arguments,
    routing_arguments,
    tensor_arguments,
)
from typed_moe.kernels._flashinfer_layouts import layout_refusal, prepare_weights
from typed_moe.kernels._flashinfer_library import FlashInferLibrary
from typed_moe.kernels._flashinfer_padding import hidden_size_of, pad_activations
from typed_moe.kernels._flashinfer_unfinalized import unfinalized_rules
from typed_moe.kernels._protocol import KernelRequest
from typed_moe.kernels._unfinalized import Unfinalized, UnfinalizedRules
from typed_moe.kernels.args import (
    ExpertArgs,
    Family,
    FromLogits,
    MoeArgs,
    Precomputed,
    Routing,
    check_in_format,
    entry_point,
)
from typed_moe.kernels.flashinfer_versions import Version, parse_version, version_text
from typed_moe.kernels.weights import ExpertWeights
from typed_moe.routing import KernelRules, MethodRules, PrecomputedRules, Refused

_DIST_AWARE = "FLASHINFER_DIST_AWARE_AUTOTUNE"


@final
class FlashInferKernel:
    """`flashinfer.fused_moe.trtllm_*_moe` and their `_routed` twins, for one layer.

    SM100 and SM103 GPUs. Output is bfloat16. Routing is by name: numbers are looked up in
    the release that is called.

    Args:
        library: the release to call; None is the installed one, imported here.
        tune_max_num_tokens: up to how many tokens the autotuner profiles. Fixed for the layer:
            a value that follows each call's T would profile again and again.
        enable_pdl: programmatic dependent launch; None leaves it to FlashInfer.

    Raises:
        UnsupportedRouting: FlashInfer is not installed or cannot be imported.
    """

    def __init__(
        self,
        library: FlashInferLibrary | None = None,
        *,
        tune_max_num_tokens: int = 8192,
        enable_pdl: bool | None = None,
    ) -> None:
        self._library = _installed() if library is None else library
        self._tune_max_num_tokens = tune_max_num_tokens
        self._enable_pdl = enable_pdl
        self._calls: WeakKeyDictionary[ExpertArgs, _Call] = WeakKeyDictionary()

    @override
    def __getstate__(self) -> dict[str, object]:
        """Without what was looked up for other records than a copy's."""
        return {**self.__dict__, "_calls": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        """As made, with nothing looked up."""
        self.__dict__.update(state)
        self._calls = WeakKeyDictionary()

    @property
    def name(self) -> str:
        """`flashinfer` and the release."""
        return f"flashinfer {self._library.version}"

    def rules(self, request: KernelRequest) -> KernelRules | Refused:
        """What the release computes for a layer, or why it cannot serve it."""
        version = parse_version(self._library.version)
        if isinstance(version, Refused):
            return version
        if version < facts.OLDEST:
            return Refused(
                f"flashinfer-python {self._library.version} is older than "
                f"{version_text(facts.OLDEST)}; upgrade it"
            )
        family = facts.family_of(request.quant)
        if family is None:
            return Refused(f"no entry point takes unquantised {request.dtype} weights")
        refused = self._library.refuses(request.device) or layer_refusal(request)
        if refused is not None:
            return refused
        return self._rules(family, version, request)

    def _rules(self, family: Family, version: Version, request: KernelRequest) -> KernelRules:
        served, not_served = facts.methods(version, family)
        for name in tuple(served):
            if self._library.number("RoutingMethodType", name) is None:
                reason = f"{self.name} has no RoutingMethodType.{name}"
                served, not_served = _without(served, name), {**not_served, name: reason}
        from_logits = self._mode_refusal(entry_point(family, FromLogits), request)
        if from_logits is not None:
            not_served = dict.fromkeys(facts.METHODS, from_logits.reason)
            served = {}
        return KernelRules(
            kernel=entry_point(family, FromLogits),
            methods=served,
            refused_methods=not_served,
            weight_on_input=family in facts.WEIGHT_ON_INPUT,
            precomputed=self._mode_refusal(entry_point(family, Precomputed), request)
            or self._precomputed(family, version, request),
            source=f"flashinfer-python {self._library.version}",
        )

    def _precomputed(
        self, family: Family, version: Version, request: KernelRequest
    ) -> PrecomputedRules | Refused:
        if request.num_fused_shared_experts and request.placement.ep_size > 1:
            return Refused("fused shared experts are not shared out over ranks; run them unfused")
        if self._library.number("RoutingMethodType", ROUTED_METHOD) is None:
            return Refused(f"{self.name} has no RoutingMethodType.{ROUTED_METHOD}")
        return facts.precomputed_rules(family, version)

    def _mode_refusal(self, entry: str, request: KernelRequest) -> Refused | None:
        """Why one entry point of the two does not run this layer."""
        parameters = self._library.parameters(entry)
        release = f"flashinfer-python {self._library.version}"
        if not parameters:
            return Refused(f"{release} has no {entry}")
        for needed, why in _needed(request):
            if needed not in parameters:
                return Refused(f"{entry} of {release} has no {needed}, and {why}")
        name = activation_arguments(request.activation)[0]
        if name != "Swiglu" and self._library.number("ActivationType", name) is None:
            return Refused(f"{release} has no activation {name}")
        if "routing_logits" not in parameters and _drops_settings(request):
            return Refused(
                f"with {_DIST_AWARE}=1 {entry} leaves out alpha, beta and the limit of "
                f"{request.activation} (run_deepseek_da_body); unset it"
            )
        if request.num_fused_shared_experts and "routing_logits" in parameters:
            return Refused(f"{entry} with fused shared experts is not used; ids are given to it")
        return None

    def prepare(self, weights: ExpertWeights, request: KernelRequest) -> ExpertWeights:
        """The weights in the entry point's layout, in the layer's own storage."""
        return prepare_weights(weights, request)

    def __call__(self, args: MoeArgs, /) -> Tensor:
        """(T, H) bfloat16; partial sums where the rank is one of several."""
        call, arguments = self._arguments(args)
        output = self._library.call(call.entry, arguments)
        return output if call.hidden_size is None else output[:, : call.hidden_size]

    def unfinalized_rules(
        self, request: KernelRequest, routing: type[Routing]
    ) -> UnfinalizedRules | Refused:
        """bfloat16, but for the float32 weights of a precomputed call that takes them as such."""
        family = facts.family_of(request.quant)
        assert family is not None, "rules refuses what has no entry point"
        return unfinalized_rules(self._library, family, routing)

    def unfinalized(self, args: MoeArgs, /) -> Unfinalized:
        """Rows in the kernel's tiles; padded widths are cut off in a copy.

        Raises:
            UnsupportedRouting: `unfinalized_rules` refuses the release.
        """
        call, arguments = self._arguments(args)
        if isinstance(call.unfinalized, Refused):
            raise UnsupportedRouting(call.unfinalized.reason)
        arguments["do_finalize"] = False
        rows, weights, index = self._library.call_unfinalized(call.entry, arguments)
        if isinstance(args.routing, FromLogits) and args.routing.use_routing_scales_on_input:
            # The kernel's own finalize leaves them out then (`trtllm_fused_moe_runner.cu`).
            weights = torch.ones_like(weights)
        if call.hidden_size is not None:
            rows = rows[:, : call.hidden_size].contiguous()
        return Unfinalized(
            gemm2_output=rows,
            expert_weights=weights,
            expanded_idx_to_permuted_idx=index.view(weights.shape),
        )

    def _arguments(self, args: MoeArgs) -> tuple[_Call, Arguments]:
        """Every keyword of a call, and what it shares with the layer's other calls."""
        check_in_format(args)
        call = self._calls.get(args.experts)
        if call is None or call.mode is not type(args.routing):
            call = self._calls[args.experts] = self._first_call(args)
        if call.hidden_size is not None:
            args = pad_activations(args, call.hidden_size)
        arguments = {
            **call.constants,
            **routing_arguments(args, self._library, packed=call.packed),
            **tensor_arguments(args, self._library),
        }
        # What changes between calls is values, not names: these were looked up once.
        for name in call.lacking:
            value = arguments.pop(name)
            if value is not None and value is not False:
                self._check_neutral(call.entry, name, value)
        for name in call.optional:
            if arguments[name] is None:
                del arguments[name]
        if args.output is not None and call.writes_output and args.output.dtype is torch.bfloat16:
            arguments["output"] = args.output
        if isinstance(args.routing, FromLogits) and args.routing.routing_replay_out is not None:
            if not call.writes_replay:
                raise UnsupportedRouting(
                    f"{call.entry} of {self.name} does not write routing_replay_out; make the layer "
                    "with routing_form=RoutingForm.PRECOMPUTED, which writes it before the kernel"
                )
            arguments["routing_replay_out"] = args.routing.routing_replay_out
        return call, arguments

    def _first_call(self, args: MoeArgs) -> _Call:
        """What all calls with these experts have in common."""
        entry = entry_point(args.family, type(args.routing))
        parameters = self._library.parameters(entry)
        version = parse_version(self._library.version)
        assert isinstance(version, tuple), "rules refuses what is no release"
        packed = facts.precomputed_rules(args.family, version).packed
        constants = self._constant(args)
        for name in constants.keys() - parameters:
            self._check_neutral(entry, name, constants.pop(name))
        varying = {
            **routing_arguments(args, self._library, packed=packed),
            **tensor_arguments(args, self._library),
        }
        hidden_size = hidden_size_of(args)
        return _Call(
            entry=entry,
            mode=type(args.routing),
            packed=packed,
            hidden_size=None if pad_activations(args, hidden_size) is args else hidden_size,
            writes_output="output" in parameters and pad_activations(args, hidden_size) is args,
            writes_replay="routing_replay_out" in parameters
            and version >= facts.REPLAY.get(_method(args), facts.REPLAY_SINCE),
            unfinalized=unfinalized_rules(self._library, args.family, type(args.routing)),
            # A number that this release has no name for is left to the function's default, which
            # is the one layout, activation or kind that the release knows.
            constants={
                name: value
                for name, value in constants.items()
                if not (value is None and name in _SAID_ELSEWHERE)
            },
            lacking=tuple(name for name in varying if name not in parameters),
            optional=tuple(
                name for name in varying if name in parameters and name in _SAID_ELSEWHERE
            ),
        )

    def _constant(self, args: MoeArgs) -> Arguments:
        arguments = constant_arguments(
            args,
            self._library,
            tune_max_num_tokens=self._tune_max_num_tokens,
            enable_pdl=self._enable_pdl,
        )
        if args.experts.gemm1_raw_clamp_limit is not None:
            arguments["gemm1_clamp_limit"] = args.experts.gemm1_raw_clamp_limit
        return arguments

    def _check_neutral(self, entry: str, name: str, value: object) -> None:
        """Refuse to leave out a parameter that says something.

        Raises:
            UnsupportedRouting: this release's function lacks it. `rules` lets no such layer
                through.
        """
        if name in _SAID_ELSEWHERE or any(value is neutral for neutral in NEUTRAL):
            return
        raise UnsupportedRouting(
            f"{entry} of flashinfer-python {self._library.version} has no {name}, and the "
            f"layer needs it to be {value}"
        )


@final
@attrs.frozen(kw_only=True, eq=False)
class _Call:
    """What the calls of one layer have in common.

    Attributes:
        entry: the entry point.
        mode: the type of the record's routing, which names the entry point of the two.
        packed: precomputed ids and weights go in one word.
        hidden_size: H, where the kernel is given a wider one; None where it is not.
        writes_output, writes_replay: it writes to the caller's buffers.
        unfinalized: what its rows come in without the sum, or why they come with it alone.
        constants: keywords that no call changes and that the function has.
        lacking: of the others, those that it lacks.
        optional: of the others, those that are left to its default where they are None.
    """

    entry: str
    mode: type[Routing]
    packed: bool
    hidden_size: int | None
    writes_output: bool
    writes_replay: bool
    unfinalized: UnfinalizedRules | Refused
    constants: Arguments
    lacking: tuple[str, ...]
    optional: tuple[str, ...]


_SAID_ELSEWHERE = frozenset(
    {
        # What every release without the parameter does.
        "do_finalize",
        "norm_topk_prob",
        "tune_max_num_tokens",
        "hidden_states_scale_layout",
        # Of other families: their layout, activation and FP8 kind are fixed.
        "use_shuffled_weight",
        "weight_layout",
        "activation_type",
        "fp8_quantization_type",
    }
)


def layer_refusal(request: KernelRequest) -> Refused | None:
    """Why no entry point of any release runs this layer; None if nothing is known against it."""
    quant, activation = request.quant, request.activation
    allowed = facts.ACTIVATIONS[quant.name]
    if activation_arguments(activation)[0] not in allowed:
        return Refused(
            f"runs {', '.join(sorted(allowed))} with {quant.name}; the activation is {activation}"
        )
    if quant.name in facts.PLAIN_SWIGLU and activation != Swiglu():
        return Refused(
            f"runs Swiglu() with {quant.name}; of {activation}, alpha, beta and the limit are left "
            "out by some of its tactics"
        )
    if quant.name in facts.RAW_LIMITS:
        if isinstance(activation, Swiglu) and activation != Swiglu():
            return Refused(
                f"with {quant.name} nothing says in which units alpha, beta and the limit of "
                f"{activation} are taken"
            )
        if request.has_bias:
            return Refused(f"with {quant.name} nothing says in which units expert biases are taken")
    experts, top_k = request.shape.num_experts, request.shape.top_k
    if facts.family_of(quant) == "fp8_block_scale" and (experts % 4 or experts <= top_k):
        return Refused(
            f"takes a multiple of 4 experts, more than top_k; here there are {experts} with "
            f"top_k {top_k}"
        )
    return layout_refusal(request)


def _drops_settings(request: KernelRequest) -> bool:
    """Whether a tactic family that is off by default would run FP8 blocks as plain Swiglu."""
    return (
        request.quant.name == "fp8_block"
        and request.activation != Swiglu()
        and os.environ.get(_DIST_AWARE, "0") == "1"
    )


def _method(args: MoeArgs) -> str | None:
    return args.routing.routing_method_type if isinstance(args.routing, FromLogits) else None


def _needed(request: KernelRequest) -> tuple[tuple[str, str], ...]:
    """Parameters that a layer cannot do without, and why."""
    needed: list[tuple[str, str]] = []
    activation = request.activation
    if not isinstance(activation, Swiglu):
        needed.append(("activation_type", f"the activation is {activation}"))
    elif activation != Swiglu():
        needed += [
            (name, f"the activation is {activation}")
            for name in ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
        ]
    if isinstance(activation, SwigluStep):
        needed.append(("gemm1_clamp_limit", f"the activation is {activation}"))
    if request.has_bias:
        needed += [(name, "the experts have biases") for name in ("gemm1_bias", "gemm2_bias")]
    if request.quant.name == "mxfp8":
        needed.append(("fp8_quantization_type", "the weights are MXFP8"))
    return tuple(needed)


def _without(served: Mapping[str, MethodRules], name: str) -> Mapping[str, MethodRules]:
    return {other: rules for other, rules in served.items() if other != name}


def installed_flashinfer(device: torch.device) -> FlashInferLibrary | Refused:
    """The installed FlashInfer, imported now, or why there is none for this device."""
    if device.type != "cuda":
        return Refused(f"runs on SM100 and SM103 GPUs; this layer is on {device}")
    try:
        return _installed()
    except UnsupportedRouting as absent:
        return Refused(str(absent))


def _installed() -> FlashInferLibrary:
    try:
        from typed_moe.kernels._flashinfer import InstalledFlashInfer  # noqa: PLC0415 - heavy
    except ImportError as error:
        raise UnsupportedRouting(
            f"flashinfer cannot be imported ({error}); pip install typed-moe[flashinfer]"
        ) from error
    return InstalledFlashInfer()
