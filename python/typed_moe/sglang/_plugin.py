"""SGLang's plugin: found by its entry point, it hooks SGLang's fused MoE in every process.

SGLang logs what a plugin raises, and goes on without it. So what is wrong is raised where SGLang
makes its first MoE layer; if not even that place can be hooked, the process is ended.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import os
import pkgutil
from collections.abc import Callable, Mapping
from enum import Enum
from importlib import metadata
from types import MappingProxyType
from typing import Literal, Protocol, cast, final

import attrs

from typed_moe.errors import UnsupportedRouting
from typed_moe.kernels._flashinfer_library import FlashInferLibrary
from typed_moe.sglang._ahead import LEADING_THERE, EnforcedLayerLike, backend_name
from typed_moe.sglang._backend import around_packed, bind_topk, build_layer, offer_backend
from typed_moe.sglang._enforce import Enforcer
from typed_moe.sglang._layers import SglangExperts, read_bf16, read_fp4, read_fp8, read_mxfp4
from typed_moe.sglang._mode import VARIABLE, Mode, read_mode
from typed_moe.sglang._observe import Observer
from typed_moe.sglang._ours import is_bypassed
from typed_moe.sglang._protocols import DispatchLike, Function, RunnerConfigLike, TopKLike
from typed_moe.sglang._seam import SeamLayerLike
from typed_moe.sglang._topk import ASIDE, READ, TopKConfigLike, read_topk_config
from typed_moe.sglang._translate import strategy_of

logger = logging.getLogger("typed_moe.sglang")

TESTED = "0.5.23"
"""The SGLang that the tests run against."""

_MOE = "sglang.srt.layers.moe"
_LAYER = f"{_MOE}.fused_moe_triton.layer.FusedMoE.__init__"
_BIND = f"{_MOE}.topk.TopK.bind_runner_backend"
_TRTLLM = f"{_MOE}.moe_runner.flashinfer_trtllm"
_PACKED = f"{_MOE}.moe_runner.triton_utils.fused_moe.fused_moe"
_FP8 = f"{_TRTLLM}.fused_experts_none_to_flashinfer_trtllm_fp8"

HOOKED = (_LAYER, _BIND, _PACKED)
"""What SGLang's registry wraps when it loads its plugins."""

Kind = Literal["AROUND", "AFTER"]
_Read = Callable[[object, RunnerConfigLike, DispatchLike, int], SglangExperts]

KERNEL_FUNCTIONS: Mapping[str, _Read] = MappingProxyType(
    {
        _FP8: cast("_Read", read_fp8),
        f"{_TRTLLM}.fused_experts_none_to_flashinfer_trtllm_fp4": cast("_Read", read_fp4),
        f"{_TRTLLM}.fused_experts_none_to_flashinfer_trtllm_bf16": cast("_Read", read_bf16),
        f"{_TRTLLM}._fused_experts_flashinfer_mxfp4_sm100_trtllm_gen": cast("_Read", read_mxfp4),
    }
)
"""SGLang's functions that build the arguments of a trtllm kernel, and how their payload is read.

They are looked up where they are called, so a hook on them covers every registered pair of
dispatcher and backend, and ModelOpt's FP8 method, which calls the first by itself. Nothing holds them
under another name, so `observe` hooks them when a layer or a TopK first leads there: SGLang's registry would
import their module in every process, and look through every module for each of them. `enforce` has it do so.
"""


@final
@attrs.frozen(kw_only=True, eq=False)
class Hook:
    """One place in SGLang, and what is put there."""

    target: str
    kind: Kind
    function: object

    def put(self) -> None:
        """Wrap the module's function as it stands now, whoever has wrapped it before.

        Raises:
            AttributeError, ImportError: SGLang has no such function.
        """
        module, name = self.target.rsplit(".", 1)
        owner = importlib.import_module(module)
        original = cast("Function", getattr(owner, name))
        hook = cast("Function", self.function)

        @functools.wraps(original)
        def around(*args: object, **kwargs: object) -> object:
            return hook(original, *args, **kwargs)

        setattr(owner, name, around)

    def taken(self) -> bool:
        """Whether SGLang's attribute still leads to the hook, through whatever else wraps it."""
        owner, name = self.target.rsplit(".", 1)
        found: object = getattr(pkgutil.resolve_name(owner), name)
        while found is not None:
            cells = getattr(found, "__closure__", None) or ()
            if any(cell.cell_contents is self.function for cell in cells):
                return True
            found = getattr(found, "__wrapped__", None)
        return False


class _HookRegistry(Protocol):
    def register(self, target: str, hook: object, hook_type: Enum) -> None: ...


@final
class Plugin:
    """What the plugin is in one process.

    Args:
        mode: what to do.
        observer: what it reports to.
        enforcer: what makes the calls that are enforced.
    """

    def __init__(self, mode: Mode, observer: Observer, enforcer: Enforcer) -> None:
        self.mode: Mode = mode
        self.observer: Observer = observer
        self.enforcer: Enforcer = enforcer
        self._configs: dict[int | None, list[TopKConfigLike]] = {}
        self._checked = False
        self.hooks: tuple[Hook, ...] = (
            Hook(target=_LAYER, kind="AROUND", function=self._around_layer),
            Hook(target=_BIND, kind="AFTER", function=self._after_bind),
            Hook(target=_PACKED, kind="AROUND", function=around_packed),
        )
        self.kernels: tuple[Hook, ...] = ()
        if mode is Mode.ENFORCE:
            # From the start: a few models call these functions by themselves, without such a layer.
            self.kernels = self._kernel_hooks()
            self.hooks += self.kernels

    def register(self) -> None:
        """Give the hooks to SGLang, which puts them in place when all plugins have run."""
        module = importlib.import_module("sglang.srt.plugins.hook_registry")
        registry = cast("_HookRegistry", module.HookRegistry)
        for hook in self.hooks:
            registry.register(hook.target, hook.function, module.HookType[hook.kind])

    def check_hooks(self) -> None:
        """Refuse to go on with a hook that is not in place.

        Raises:
            UnsupportedRouting: SGLang lacks the place, or something else has taken it.
        """
        self._refuse_missing([hook.target for hook in self.hooks if not _taken(hook)])
        self._check_settings()
        self._checked = True

    def _refuse_missing(self, missing: list[str]) -> None:
        if missing:
            raise UnsupportedRouting(
                f"typed-moe's hooks are not in place in SGLang {_release()} ({', '.join(missing)}): "
                f"it is tested with {TESTED}, and another plugin may have replaced them. Set "
                f"{VARIABLE}=off to serve without typed-moe"
            )

    def hook_kernels(self) -> None:
        """Put the hooks on `KERNEL_FUNCTIONS`, once in a process.

        Raises:
            UnsupportedRouting: SGLang lacks one of them.
        """
        if self.kernels:
            return
        hooks = self._kernel_hooks()
        self._refuse_missing([hook.target for hook in hooks if not _is_there(hook)])
        for hook in hooks:
            hook.put()
        self.kernels = hooks

    def _kernel_hooks(self) -> tuple[Hook, ...]:
        return tuple(
            Hook(target=target, kind="AROUND", function=self._around_kernel(read))
            for target, read in KERNEL_FUNCTIONS.items()
        )

    def _check_settings(self) -> None:
        """Refuse to route by settings that another SGLang has added, or no longer has.

        Raises:
            UnsupportedRouting: a field that is read is gone; or, where calls are ours, there is one
                whose meaning is not known. `observe` warns of that.
        """
        config = importlib.import_module(f"{_MOE}.topk").TopKConfig
        fields = {one.name for one in dataclasses.fields(config)}
        gone, new = READ - fields, fields - READ - ASIDE
        if gone or (new and self.mode is Mode.ENFORCE):
            raise UnsupportedRouting(
                f"TopKConfig of SGLang {_release()} has no {sorted(gone)} and has {sorted(new)}; "
                f"what SGLang {TESTED} has is what is known. Set {VARIABLE}=off to serve without "
                "typed-moe"
            )
        if new:
            logger.warning(
                "typed-moe: TopKConfig of SGLang %s has %s, which is not read; what is reported "
                "here may be for that reason",
                _release(),
                sorted(new),
            )

    def _around_layer(
        self, original: Function, layer: SeamLayerLike, *args: object, **kwargs: object
    ) -> None:
        if not self._checked:
            self.check_hooks()
        build_layer(original, layer, args, kwargs)
        if backend_name(cast("EnforcedLayerLike", layer).runner_backend) in LEADING_THERE:
            self.hook_kernels()
        if self.mode is Mode.ENFORCE:
            # Our runners give finished sums; the model asks before it takes unfinished ones.
            layer.supports_deferred_finalize = False
            self.enforcer.ahead.made(cast("EnforcedLayerLike", layer))

    def _after_bind(
        self,
        result: object,
        topk: TopKLike,
        runner_backend: object,
        *,
        routing_method_type: int | None = None,
    ) -> object:
        method = _method_name(topk, routing_method_type)
        self.observer.bound(topk, method)
        if backend_name(runner_backend) in LEADING_THERE:
            self.hook_kernels()
        bind_topk(topk, runner_backend, method)
        if self.mode is Mode.ENFORCE:
            self.enforcer.ahead.bound(topk, method)
        known = self._configs.setdefault(topk.topk_config.layer_id, [])
        if not any(topk.topk_config is one for one in known):  # binding twice is allowed
            known.append(topk.topk_config)
        return result

    def _restored(self, dispatch: DispatchLike) -> DispatchLike:
        """With the settings that the model made, where SGLang has rebuilt them from a few.

        A piecewise CUDA graph hands a layer's logits on without `scoring_func`, the factor and
        whether there are groups (`fused_moe_bypassed_piecewise_cuda_graph_impl`).

        Raises:
            UnsupportedRouting: the layer has several TopKs, and nothing says which it is.
        """
        topk = dispatch.topk_output
        if not is_bypassed(topk):
            return dispatch
        config = topk.topk_config
        known = self._configs.get(config.layer_id, [])
        if not known or any(config is one for one in known):
            return dispatch
        if len(known) > 1:
            raise UnsupportedRouting(
                f"layer {config.layer_id} has {len(known)} TopKs, and a piecewise CUDA graph hands "
                "on the logits of one without saying whose; serve without piecewise graphs"
            )
        return dispatch._replace(topk_output=topk._replace(topk_config=known[0]))

    def _around_kernel(self, read: _Read) -> object:
        def hook(
            original: Function,
            dispatch_output: DispatchLike,
            quant_info: object,
            runner_config: RunnerConfigLike,
            *args: object,
            **kwargs: object,
        ) -> object:
            if self.mode is Mode.ENFORCE:
                given = _materialised(self._restored(dispatch_output), read)
                return self.enforcer.call(
                    functools.partial(read, quant_info, runner_config),
                    quant_info,
                    runner_config,
                    given,
                )
            if not self.observer.wants(runner_config, dispatch_output):
                return original(dispatch_output, quant_info, runner_config, *args, **kwargs)

            def call() -> object:
                return original(dispatch_output, quant_info, runner_config, *args, **kwargs)

            try:
                restored = self._restored(dispatch_output)
            except UnsupportedRouting:
                return call()  # nothing to compare with; SGLang's own call needs no settings
            experts = functools.partial(read, quant_info, runner_config)
            return self.observer.observe(experts, runner_config, restored, call)

        return hook


def plugin() -> None:
    """The entry point `typed_moe` of `sglang.srt.plugins`.

    Raises:
        SystemExit: SGLang has no place where a problem could be raised later, or the environment
            asks for a mode that there is not. SGLang would log any other error and serve on.
    """
    try:
        mode = read_mode(os.environ)
    except ValueError as error:
        raise SystemExit(f"typed-moe: {error}") from error
    if mode is Mode.OFF:
        logger.info("typed-moe: %s=off; SGLang runs by itself", VARIABLE)
        return
    try:
        owner, name = _LAYER.rsplit(".", 1)
        getattr(pkgutil.resolve_name(owner), name)
    except (ImportError, AttributeError) as error:
        raise SystemExit(
            f"typed-moe: SGLang {_release()} has no {_LAYER} ({error}); it is tested with {TESTED}. "
            f"Set {VARIABLE}=off to serve without typed-moe"
        ) from error
    observer = Observer(_served_model, installed_flashinfer)
    _active.append(Plugin(mode, observer, Enforcer(installed_flashinfer)))
    _active[-1].register()
    offer_backend()
    logger.info(
        "typed-moe: %s=%s in SGLang %s: %s the calls to FlashInfer's trtllm fused MoE kernels "
        "(flashinfer_trtllm, flashinfer_trtllm_routed, flashinfer_mxfp4), compares the routing "
        "method number of every TopK, and leaves other backends alone",
        VARIABLE,
        mode.value,
        _release(),
        "makes" if mode is Mode.ENFORCE else "compares, and does not change,",
    )


_active: list[Plugin] = []


def active_plugin() -> Plugin | None:
    """This process's plugin; None where SGLang has not called for it, or it is off."""
    return _active[-1] if _active else None


def _taken(hook: Hook) -> bool:
    try:
        return hook.taken()
    except (ImportError, AttributeError):
        return False


def _is_there(hook: Hook) -> bool:
    module, name = hook.target.rsplit(".", 1)
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


def _materialised(dispatch: DispatchLike, read: _Read) -> DispatchLike:
    """Routed by SGLang where it remaps expert ids, or its FP8 path masks padded tokens.

    Nothing here could do either from logits, and SGLang's own functions would do the same.
    """
    topk = dispatch.topk_output
    if not is_bypassed(topk):
        return dispatch
    masked = read is KERNEL_FUNCTIONS[_FP8] and topk.num_token_non_padded is not None
    if masked or topk.expert_location_dispatch_info is not None:
        return dispatch._replace(topk_output=topk.to_standard())
    return dispatch


def _method_name(topk: TopKLike, method: int | None) -> str | None:
    """The name of SGLang's number.

    Raises:
        ValueError: SGLang has no such number.
    """
    if method is None:
        return None
    methods = cast(
        "Callable[[int], Enum]",
        importlib.import_module(f"{_MOE}.utils").RoutingMethodType,
    )
    try:
        return methods(method).name
    except ValueError as error:
        rule = strategy_of(read_topk_config(topk.topk_config))
        raise ValueError(
            f"routing_method_type is {method}, which SGLang {_release()} has no name for; the TopK "
            f"of layer {topk.layer_id} computes {rule}"
        ) from error


def _release() -> str:
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return "(from a checkout)"


def _served_model() -> str:
    """The architecture of the model that this process serves, or where it is from."""
    context = importlib.import_module("sglang.srt.runtime_context")
    arguments = context.get_server_args()
    try:
        names: object = context.process_model_config().hf_config.architectures
    except (AttributeError, OSError, RuntimeError, ValueError):
        names = None
    return str(names[0]) if isinstance(names, list) and names else str(arguments.model_path)


def installed_flashinfer() -> FlashInferLibrary:
    """The FlashInfer that SGLang calls, imported now."""
    from typed_moe.kernels._flashinfer import InstalledFlashInfer  # noqa: PLC0415 - heavy

    return InstalledFlashInfer()
