"""What SGLang imports and a machine without a GPU does not have: torchvision, and vllm's operators.

SGLang names both at import and calls neither on a CPU. A CPU build of torch refuses torchvision's
wheel, and vllm is not installed for one name.
"""

from __future__ import annotations

import enum
import importlib.machinery
import sys
import types

import torch
from torch import Tensor


class InterpolationMode(enum.Enum):
    """torchvision's, of which image processors read members while they are defined."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def _module(name: str, **attributes: object) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    for attribute, value in attributes.items():
        setattr(module, attribute, value)
    sys.modules[name] = module
    return module


def _refuse(*_: object, **__: object) -> None:
    raise NotImplementedError("a stand-in for vllm's operator was called")


def install() -> None:
    """Put the stand-ins into `sys.modules`, once. Before anything of SGLang's."""
    if "torchvision" in sys.modules:
        return
    # transformers looks for the distribution and remembers: with the stand-in in place first, it
    # would take it for the real one.
    from transformers.utils import import_utils

    import_utils.is_torchvision_available()
    functional = _module("torchvision.transforms.functional", InterpolationMode=InterpolationMode)
    transforms = _module(
        "torchvision.transforms", functional=functional, InterpolationMode=InterpolationMode
    )
    _module("torchvision", transforms=transforms, __version__="0.0.0")
    operators = _module("vllm._custom_ops", rotary_embedding=_refuse)
    _module("vllm", _custom_ops=operators)


def install_qwen2_gate() -> None:
    """qwen2_moe's Triton function for its shared expert's gate, in torch."""
    import sglang.srt.models.qwen2_moe as qwen2

    qwen2.fused_gate_sigmoid_mul_add = gate_sigmoid_mul_add


def gate_sigmoid_mul_add(
    x: Tensor, weight: Tensor, shared: Tensor, routed: Tensor, *_: object
) -> None:
    """routed += sigmoid(x @ weight) * shared."""
    routed.add_(torch.sigmoid(x @ weight.reshape(-1, 1)) * shared)
