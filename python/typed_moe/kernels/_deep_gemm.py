"""The one file that imports deep_gemm."""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import final

import deep_gemm
import torch
from torch import Tensor

from typed_moe.routing import Refused

_DISTRIBUTIONS = ("sgl-deep-gemm", "deep-gemm")
_HOPPER = (9, 0)
_CALLED = (
    "get_mk_alignment_for_contiguous_layout",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_bf16_gemm_nt_contiguous",
)


@final
class InstalledDeepGemm:
    """The DeepGEMM of this environment: DeepSeek's, or SGLang's branch of it (sgl-deep-gemm)."""

    @property
    def name(self) -> str:
        """See `DeepGemmLibrary.name`."""
        for distribution in _DISTRIBUTIONS:
            try:
                return f"{distribution} {metadata.version(distribution)}"
            except metadata.PackageNotFoundError:
                continue
        return "deep_gemm"

    def refuses(self, device: torch.device) -> Refused | None:
        """See `DeepGemmLibrary.refuses`."""
        if device.type != "cuda":
            return Refused(f"runs on CUDA devices; this layer is on {device}")
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) != _HOPPER:
            # Blackwell's products read packed E8M0 scales: another layout, and another rounding.
            return Refused(
                "is called for compute capability 9.0, whose products read float32 scales as they are "
                f"stored; {device} has {major}.{minor}"
            )
        missing = [name for name in _CALLED if not hasattr(deep_gemm, name)]
        if missing:
            return Refused(
                f"lacks {missing[0]}, which sgl-deep-gemm 0.1.5 has; this is {self.name}"
            )
        return _compiler_refusal()

    def alignment(self) -> int:
        """See `DeepGemmLibrary.alignment`."""
        return deep_gemm.get_mk_alignment_for_contiguous_layout()

    def fp8(
        self,
        rows: tuple[Tensor, Tensor],
        weights: tuple[Tensor, Tensor],
        out: Tensor,
        group: Tensor,
    ) -> None:
        """See `DeepGemmLibrary.fp8`."""
        with torch.cuda.device(out.device):
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous(rows, weights, out, group)

    def bf16(self, rows: Tensor, weights: Tensor, out: Tensor, group: Tensor) -> None:
        """See `DeepGemmLibrary.bf16`."""
        with torch.cuda.device(out.device):
            deep_gemm.m_grouped_bf16_gemm_nt_contiguous(rows, weights, out, group)


def _compiler_refusal() -> Refused | None:
    """DeepGEMM compiles a kernel at the first call of a size: is there anything to compile it with?"""
    if os.environ.get("DG_JIT_USE_NVRTC", "0") not in {"", "0"}:
        return None
    named = os.environ.get("DG_JIT_NVCC_COMPILER")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = Path(named) if named else Path(home or "/usr/local/cuda") / "bin" / "nvcc"
    if found.exists() or (not named and not home and shutil.which("nvcc")):
        return None
    return Refused(
        f"compiles its kernels with nvcc, and there is none at {found}; set CUDA_HOME to a CUDA "
        "toolkit, or DG_JIT_USE_NVRTC=1"
    )
