"""The experts of one mixture-of-experts layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, final

import attrs
import torch
from torch import Tensor, nn
from typing_extensions import override

from typed_moe.config import (
    Activation,
    Format,
    Fp8PerTensor,
    Nvfp4,
    Placement,
    Swiglu,
    Unquantized,
    is_gated,
)
from typed_moe.errors import CheckpointError, UnsupportedRouting
from typed_moe.kernels import (
    ExpertWeights,
    KernelRequest,
    MoeKernel,
    ReferenceKernel,
    Unfinalized,
)
from typed_moe.layer._checkpoint_names import read_names
from typed_moe.layer._checks import (
    check_buffers,
    check_call,
    check_exchange,
    check_layer,
    check_routing,
    check_shards,
    ranges,
)
from typed_moe.layer._loading import ExpertLoader
from typed_moe.layer._parameters import (
    ExpertSizes,
    fields_of,
    is_unloaded,
    parameter_specs,
    unloaded,
)
from typed_moe.models import CheckpointLayout
from typed_moe.quantization import calibration_scale
from typed_moe.routing import BiasRule, Refused, RoutingForm, RoutingShape, RoutingStrategy
from typed_moe.runners import (
    NO_BUFFERS,
    CallBuffers,
    EpMoeRunner,
    KernelRunner,
    Plan,
    TokenExchange,
    decide,
    make_runner,
)

_UNFINISHED = "an unfinished preparation"


@final
class FusedMoE(nn.Module):
    """The routed experts of one layer: y = sum over the chosen experts of weight * expert(x).

    expert(x) = w2 @ activation(w13 @ x), with the gate's rows above the up projection's in w13.
    The gate that makes the router logits and unfused shared experts stay the model's.

    One forward pass: the strategy prepares the routing (or tells the kernel how), the runner
    quantises the activations and builds the kernel's argument record, the kernel runs.
    `plan` says what was decided, and why.

    Parameters (L local experts, M = 2I if gated, else I):
        w13_weight (L, M, H), w2_weight (L, H, I), and by format their scales:
        `w13_weight_scale_inv` (Fp8BlockScale); `w13_weight_scale` (Fp8PerTensor,
        Fp8PerChannel, MxFp8, MxFp4, MxInt4);
        `w13_weight_scale` and `w13_weight_scale_2` (Nvfp4); `w13_input_scale` (Fp8PerTensor,
        Nvfp4). The same for `w2`. With `has_bias`: `w13_weight_bias`, `w2_weight_bias`.
        Packed FP4 and int4 weights hold two values per byte.
    Buffers:
        e_score_correction_bias (E,), in the dtype that was loaded, where the strategy reads
        one; None otherwise.

    Args:
        num_experts: routed experts of the whole layer, E.
        top_k: experts per token, k.
        hidden_size: width of the experts' input and output, H.
        intermediate_size: width between an expert's two matrices, whole, I.
        routing: how tokens choose experts. There is no default.
        quant: format of weights and activations.
        activation: between the two matrices.
        num_fused_shared_experts: experts that every token goes to with weight 1, held behind
            the routed ones; 0 if the model runs its shared experts itself.
        has_bias: whether the experts have bias vectors.
        placement: this rank's share under tensor and expert parallelism. Under either the
            output is a partial sum, which the caller adds over the ranks, or `exchange` does.
        exchange: how tokens travel between the ranks and the sums back, such as
            `AllReduce(group=group)` where every rank has the same tokens; the output is then
            the whole sum. Every rank has to call the layer then, also with no tokens. None: the
            caller adds the partial sums.
        kernel: the kernel to run; None chooses one for the device.
        routing_form: who routes; None prefers the kernel.
        strict: refuse a degraded plan, such as routing outside a kernel.
        prefix: the layer's name in the model, for messages.
        device, dtype: torch's factory arguments; dtype is of activations and of unquantised
            weights.

    Raises:
        TypeError: `routing` is no strategy, `exchange` no exchange, or dtype is no float32,
            bfloat16 or float16.
        ValueError: numbers that do not fit together, or the exchange's ranks are not the
            placement's; the message has them.
        UnsupportedRouting: no kernel serves the layer.
    """

    e_score_correction_bias: Tensor | None
    _runner: KernelRunner | EpMoeRunner | None

    def __init__(
        self,
        *,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        routing: RoutingStrategy,
        quant: Format = Unquantized(),  # noqa: B008 - frozen, without state
        activation: Activation = Swiglu(),  # noqa: B008 - frozen, without state
        num_fused_shared_experts: int = 0,
        has_bias: bool = False,
        placement: Placement = Placement(),  # noqa: B008 - frozen, without state
        exchange: TokenExchange | None = None,
        kernel: MoeKernel | None = None,
        routing_form: RoutingForm | None = None,
        strict: bool = False,
        prefix: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_routing(routing)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        check_layer(dtype, hidden_size, intermediate_size, num_fused_shared_experts)
        if num_fused_shared_experts and routing.apply_router_weight_on_input:
            raise ValueError(
                f"{routing.name} weights the experts' input and num_fused_shared_experts is "
                f"{num_fused_shared_experts}; allowed: 0, because a shared expert's input has no "
                "weight. Run the shared experts unfused"
            )
        check_exchange(exchange, placement)
        # With its index: a tensor made on "cuda" says "cuda:0", and the two compare unequal.
        device = torch.empty(0, device=device).device
        self.prefix = prefix
        self._kernel, self._form, self._strict = kernel, routing_form, strict
        self._exchange = exchange
        self._request = KernelRequest(
            shape=RoutingShape(num_experts=num_experts, top_k=top_k),
            quant=quant,
            activation=activation,
            placement=placement,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_fused_shared_experts=num_fused_shared_experts,
            has_bias=has_bias,
            device=device,
            dtype=dtype,
        )
        self._strategy = routing
        self._layout: str | None = None
        self._borrowed = False
        self._decide()
        self._make_parameters()
        self._make_correction_bias()

    @property
    def plan(self) -> Plan:
        """What was decided for this layer, and why. `print(experts.plan)` reads well."""
        return self._decision.plan

    @property
    def routing(self) -> RoutingStrategy:
        """The strategy that the model injected."""
        return self._strategy

    def _decide(self) -> None:
        self._decision = decide(
            self._request,
            self._strategy,
            kernel=self._kernel,
            form=self._form,
            strict=self._strict,
            exchange=None if self._exchange is None else self._exchange.name,
        )
        self._runner = None

    def _make_parameters(self) -> None:
        request = self._request
        local = request.placement.num_local_experts(request.shape.num_experts)
        width = request.placement.local_intermediate_size(request.intermediate_size)
        check_shards(request, width)
        sizes = ExpertSizes(
            experts=local + request.num_fused_shared_experts,
            first_rows=2 * width if is_gated(request.activation) else width,
            hidden_size=request.hidden_size,
            intermediate_size=width,
        )
        specs = parameter_specs(
            request.quant, sizes, dtype=request.dtype, has_bias=request.has_bias
        )
        for name, spec in specs.items():
            tensor = unloaded(name, spec, request.device)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def _make_correction_bias(self) -> None:
        request = self._request
        bias = None
        if self._strategy.bias is BiasRule.REQUIRED:
            bias = torch.full(
                (request.shape.num_experts,), torch.nan, dtype=torch.float32, device=request.device
            )
        self.register_buffer("e_score_correction_bias", bias)

    @override
    def forward(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        *,
        output: Tensor | None = None,
        routing_replay_out: Tensor | None = None,
    ) -> Tensor:
        """The routed experts' output.

        Args:
            hidden_states: (T, H) floating point; T may be 0.
            router_logits: (T, E) floating point, as the model's gate gives them.
            output: (T, H) in the dtype of `hidden_states`, contiguous: where the result goes. The
                kernel writes there itself where it can.
            routing_replay_out: (T or more, k) int16, contiguous: where the global ids of each
                token's experts go, into the first T rows.

        Returns:
            (T, H) in the dtype of `hidden_states`. Under tensor or expert parallelism a partial
            sum where the layer has no exchange. A factor that the plan leaves to the host is not in it.

        Raises:
            ValueError: a tensor's shape or device is not the layer's, or a weight or bias was
                never loaded (looked at before the first call).
            TypeError: a dtype that the strategy or the layer refuses.
            UnsupportedRouting: routing_replay_out is given to a kernel that does not write it.
        """
        self._check_call(hidden_states, router_logits)
        buffers = NO_BUFFERS
        if output is not None or routing_replay_out is not None:
            buffers = CallBuffers(output=output, routing_replay_out=routing_replay_out)
            check_buffers(self._label(), self._request, hidden_states, buffers)
        runner = self._ready()
        # With an exchange a rank without tokens still has its experts' part for the others to do.
        if hidden_states.shape[0] == 0 and self._exchange is None:
            return torch.empty_like(hidden_states) if output is None else output
        return runner(hidden_states, router_logits, self.e_score_correction_bias, buffers)

    def forward_unfinalized(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        *,
        routing_replay_out: Tensor | None = None,
    ) -> Unfinalized:
        """The experts' outputs before the weighted sum, for a caller that adds up by itself.

        forward_unfinalized(x, logits).finalize() is the layer's output. What it is for: one kernel
        that adds up, all-reduces over the ranks and norms.

        Args:
            hidden_states: as for the layer's call.
            router_logits: as for the layer's call.
            routing_replay_out: as for the layer's call.

        Returns:
            Rows, weights and where each slot's row stands, in the dtypes of `plan.unfinalized`. For
            T = 0 there are no rows.

        Raises:
            ValueError, TypeError: as for the layer's call.
            UnsupportedRouting: `plan.unfinalized` is a refusal; its reason.
        """
        rules = self.plan.unfinalized
        if isinstance(rules, Refused):
            raise UnsupportedRouting(f"{self._label()}: {rules.reason}")
        self._check_call(hidden_states, router_logits)
        buffers = NO_BUFFERS
        if routing_replay_out is not None:
            buffers = CallBuffers(routing_replay_out=routing_replay_out)
            check_buffers(self._label(), self._request, hidden_states, buffers)
        runner = self._ready()
        assert isinstance(runner, KernelRunner), "the plan refuses an exchange"
        if hidden_states.shape[0] == 0:
            request = self._request
            slots = request.shape.top_k + request.num_fused_shared_experts
            return Unfinalized(
                gemm2_output=hidden_states.new_empty(
                    (0, request.hidden_size), dtype=rules.rows_dtype
                ),
                expert_weights=hidden_states.new_empty((0, slots), dtype=rules.weights_dtype),
                expanded_idx_to_permuted_idx=hidden_states.new_empty((0, slots), dtype=torch.int32),
            )
        return runner.unfinalized(
            hidden_states, router_logits, self.e_score_correction_bias, buffers
        )

    def _ready(self) -> KernelRunner | EpMoeRunner:
        """The runner, made now if this is the first call."""
        if self._runner is not None:
            return self._runner
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "call prepare_weights() before torch.compile: looking at the weights waits for "
                "the device, which a graph cannot"
            )
        return self.prepare_weights()

    if TYPE_CHECKING:

        @override
        def __call__(
            self,
            hidden_states: Tensor,
            router_logits: Tensor,
            *,
            output: Tensor | None = None,
            routing_replay_out: Tensor | None = None,
        ) -> Tensor: ...

    def load_weights(
        self,
        weights: Iterable[tuple[str, Tensor]],
        *,
        layout: CheckpointLayout = CheckpointLayout.SEPARATE,
    ) -> set[str]:
        """Load this rank's experts from a Hugging Face checkpoint's tensors.

        Values in the layer's format are copied; others are converted: an FP8 checkpoint into a
        bfloat16 layer, a bfloat16 one into any format.

        Args:
            weights: (name, tensor) below the experts' prefix, such as `0.gate_proj.weight` or
                `gate_up_proj`, and `e_score_correction_bias` where the strategy reads one.
                Fused shared experts are experts E, E + 1, ...
            layout: how the checkpoint stores the experts; never guessed.

        Returns:
            The names that were read.

        Raises:
            CheckpointError: a name, shape or dtype does not fit, or an expert of this rank is
                missing.
        """
        self._runner = None
        experts: list[tuple[str, Tensor]] = []
        names: set[str] = set()
        for name, tensor in weights:
            if name == "e_score_correction_bias":
                if name in names:
                    raise CheckpointError(
                        f"{self._label()}: {name} was given twice; allowed: every tensor once"
                    )
                self._load_correction_bias(tensor)
                names.add(name)
            else:
                experts.append((name, tensor))
        if experts:
            names |= self._load_experts(experts, layout)
        return names

    def _load_experts(
        self, weights: Iterable[tuple[str, Tensor]], layout: CheckpointLayout
    ) -> set[str]:
        request = self._request
        total = request.shape.num_experts + request.num_fused_shared_experts
        found = read_names(weights, layout, total)
        loader = ExpertLoader(
            quant=request.quant,
            placement=request.placement,
            hidden_size=request.hidden_size,
            intermediate_size=request.intermediate_size,
            gated=is_gated(request.activation),
            has_bias=request.has_bias,
        )
        wanted = self._local_experts()
        missing = [expert for expert in wanted if expert not in found.experts]
        if missing:
            raise CheckpointError(
                f"{self._label()}: experts {ranges(missing)} are missing; the checkpoint has "
                f"{ranges(sorted(found.experts)) or 'none'}"
            )
        if self._layout is not None:
            self._layout = None
            self._make_parameters()
        parameters = {name: parameter.data for name, parameter in self.named_parameters()}
        loader.forget_input_scales(parameters)
        for row, expert in enumerate(wanted):
            loader.load(parameters, row, expert, found.experts[expert])
        return set(found.names)

    def _local_experts(self) -> list[int]:
        """Global ids of this rank's experts, fused shared ones last."""
        request = self._request
        total = request.shape.num_experts
        first = request.placement.local_expert_offset(total)
        local = request.placement.num_local_experts(total)
        shared = range(total, total + request.num_fused_shared_experts)
        return [*range(first, first + local), *shared]

    def _load_correction_bias(self, tensor: Tensor) -> None:
        target = self.e_score_correction_bias
        if target is None:
            raise CheckpointError(
                f"{self._label()}: the checkpoint has an e_score_correction_bias and "
                f"{self._strategy.name} reads none; is routing= the model's?"
            )
        if tensor.shape != target.shape or not tensor.is_floating_point():
            raise CheckpointError(
                f"{self._label()}: e_score_correction_bias is {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}; allowed: floating point of shape {tuple(target.shape)}"
            )
        # In its stored dtype: rounding a float32 bias changes which experts are chosen.
        self.e_score_correction_bias = tensor.to(target.device, copy=True)

    def validate_weights(self) -> None:
        """Refuse weights, scales or a correction bias that are NaN, infinite or never loaded.

        Called before the first forward pass, since it synchronises with the device; also
        callable after loading.

        Raises:
            ValueError: names the layer and the tensors.
        """
        tensors = [(name, parameter.data) for name, parameter in self.named_parameters()]
        if self.e_score_correction_bias is not None:
            tensors.append(("e_score_correction_bias", self.e_score_correction_bias))
        broken = [name for name, tensor in tensors if is_unloaded(name, tensor)]
        if broken:
            hint = ""
            if any(name.endswith("input_scale") for name in broken):
                hint = "; a static input_scale comes from the checkpoint or from calibrate()"
            raise ValueError(
                f"{self._label()}: {', '.join(broken)} hold NaN or infinite values or were never "
                f"loaded; load them with load_weights{hint}"
            )

    def prepare_weights(self) -> KernelRunner | EpMoeRunner:
        """Look at the weights, and give them to the kernel in its own layout.

        Called before the first forward pass; call it earlier to have the time spent at
        loading, and before torch.compile. What no call changes is computed here. From then on
        the parameters are the kernel's: new weights go in by `load_weights`, not by writing
        into a parameter.

        Returns:
            The runner that the forward passes use.

        Raises:
            ValueError: as `validate_weights`.
        """
        if self._layout == _UNFINISHED:
            self._refuse_layout("that failed, so that some experts have it and some have not")
        self.validate_weights()
        weights = self._prepared() if self._layout is None else self._weights()
        runner = make_runner(self._decision, weights)
        self._runner = runner if self._exchange is None else EpMoeRunner(runner, self._exchange)
        return self._runner

    def _prepared(self) -> ExpertWeights:
        """The kernel's layout of the weights, kept in place of the stored one."""
        if self._borrowed:
            # Of a state dict that was assigned: the caller's, who may load it again.
            for parameter in self.parameters():
                parameter.data = parameter.data.clone()
            self._borrowed = False
        weights = self._weights()
        self._layout = _UNFINISHED
        prepared = self._decision.kernel.prepare(weights, self._request)
        self._layout = None
        if prepared is not weights:
            self._keep(prepared)
        return prepared

    def _keep(self, prepared: ExpertWeights) -> None:
        """A kernel's layout in place of the stored one; what comes next has to know."""
        for name, field in fields_of(self._request.quant).items():
            tensor: Tensor | None = getattr(prepared, field)
            if tensor is not None:
                self.get_parameter(name).data = tensor.detach()
        self._layout = self.plan.kernel

    def _refuse_layout(self, what: str) -> None:
        if self._layout is not None:
            raise ValueError(
                f"{self._label()}: the weights are in the layout of {self._layout} since before the "
                f"first call, and {what}; load them again with load_weights, or do it before the first "
                "call"
            )

    @torch.no_grad()
    def calibrate(self, hidden_states: Tensor, router_logits: Tensor) -> None:
        """Set the static activation scales from the ranges that these tokens show.

        For `Fp8PerTensor` and `Nvfp4`; the other formats have none and nothing happens. The
        weights have to be loaded. With an exchange every rank calls it, and this rank's experts
        are shown the tokens that the exchange brings them; the ranks' scales of the
        intermediate may differ, as each sees its own experts' alone. Each scale is the largest magnitude seen over the largest
        value of the format.

        Args:
            hidden_states: (T, H), like the ones that will come; T of 1 or more, on one rank at
                least if there is an exchange.
            router_logits: (T, E).

        Raises:
            ValueError: there are no tokens, or a shape is not the layer's.
        """
        quant = self._request.quant
        if not isinstance(quant, Fp8PerTensor | Nvfp4):
            return
        self._check_call(hidden_states, router_logits)
        if self._exchange is not None:
            shown = self._exchange.dispatch(hidden_states, router_logits)
            hidden_states, router_logits = shown.hidden_states, shown.router_logits
        if hidden_states.shape[0] == 0:
            raise ValueError(f"{self._label()}: calibrate was given no tokens; allowed: 1 or more")
        self._refuse_layout("calibrate needs them as stored")
        seen: list[Tensor] = []
        observer = ReferenceKernel(on_intermediate=lambda hidden: seen.append(hidden.abs().max()))
        decision = decide(self._request, self._strategy, kernel=observer, form=self._form)
        weights = self._weights()
        assert weights.w13_input_scale is not None, "the format has static scales"
        assert weights.w2_input_scale is not None, "the format has static scales"
        amax = hidden_states.abs().max().float()
        weights.w13_input_scale.data.copy_(calibration_scale(amax, quant))
        weights.w2_input_scale.data.fill_(1.0)
        runner = make_runner(decision, weights)
        try:
            runner(hidden_states, router_logits, self.e_score_correction_bias)
        except Exception:
            weights.w2_input_scale.data.fill_(torch.nan)
            raise
        widest = torch.stack(seen).max() if seen else torch.zeros((), dtype=torch.float32)
        weights.w2_input_scale.data.copy_(calibration_scale(widest, quant))
        self._runner = None

    @override
    def extra_repr(self) -> str:
        """The layer in one line."""
        request = self._request
        return (
            f"num_experts={request.shape.num_experts}, top_k={request.shape.top_k}, "
            f"routing={self._strategy!r}, quant={request.quant!r}, kernel={self.plan.kernel}"
        )

    @override
    def __getstate__(self) -> dict[str, object]:
        """Without the runner, which a copy makes anew for its own tensors."""
        return {**self.__dict__, "_runner": None}

    @override
    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Take a parameter, also one that is assigned; the next call makes its runner anew."""
        if getattr(self, "_layout", None) is not None:
            self._refuse_layout("a parameter that is assigned is as stored")
        super().register_parameter(name, param)
        self._runner = None

    @override
    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *args: object
    ) -> None:
        """Load as torch does, but the correction bias in the dtype that it was stored in.

        The weights are looked at again before the next call.
        """
        self._refuse_layout("a state dict has them as stored")
        bias = state_dict.get(f"{prefix}e_score_correction_bias")
        if bias is not None and self.e_score_correction_bias is not None:
            # torch copies into the buffer that is there, and would round to its dtype.
            self.e_score_correction_bias = self.e_score_correction_bias.to(bias.dtype)
        metadata = args[0] if args else None
        if isinstance(metadata, Mapping) and metadata.get("assign_to_params_buffers"):
            self._borrowed = True
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._runner = None

    @override
    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        """As torch does, while the weights are as stored."""
        self._refuse_layout("a state dict has them as stored")
        super()._save_to_state_dict(destination, prefix, keep_vars)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedMoE:
        """Move the tensors as asked, and plan again for where they are.

        `.to(dtype)`, `.half()` and the like change unquantised weights alone: a quantised value
        is no number without its scale, and a correction bias keeps its stored dtype because
        rounding it changes which experts are chosen (sglang#37133).
        """
        request = self._request
        probe = fn(torch.empty(0, dtype=request.dtype, device=request.device))
        if (probe.device, probe.dtype) != (request.device, request.dtype):
            self._refuse_layout("another device or dtype may have another kernel")

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            castable = isinstance(request.quant, Unquantized) and tensor.dim() == 3
            if moved.dtype == tensor.dtype or castable:
                return moved
            return tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._request = attrs.evolve(request, device=probe.device, dtype=probe.dtype)
        self._runner = None
        self._decide()
        return self

    def _weights(self) -> ExpertWeights:
        tensors = {
            field: self._parameters.get(name)
            for name, field in fields_of(self._request.quant).items()
        }
        w13_weight, w2_weight = tensors.pop("w13_weight"), tensors.pop("w2_weight")
        assert w13_weight is not None, "every format has it"
        assert w2_weight is not None, "every format has it"
        return ExpertWeights(w13_weight=w13_weight, w2_weight=w2_weight, **tensors)

    def _check_call(self, hidden_states: Tensor, router_logits: Tensor) -> None:
        check_call(self._label(), self._request, hidden_states, router_logits)

    def _label(self) -> str:
        return f"FusedMoE {self.prefix}" if self.prefix else "FusedMoE"
