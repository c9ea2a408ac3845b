"""The installed DeepGEMM, for the tests that run it."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import cache

import torch

from typed_moe import Refused
from typed_moe.kernels import installed_deep_gemm


@cache
def deep_gemm_absent() -> str | None:
    """Why it does not run on this machine; None: it does.

    This process compiles into a folder of its own. Two that share one, as pytest's processes would, meet a
    kernel that the other is still compiling, which DeepGEMM takes for a broken cache and stops ("Corrupted
    JIT cache directory").
    """
    if not torch.cuda.is_available():
        return "no CUDA device on this machine"
    if "TRITON_INTERPRET" in os.environ:
        return "Triton's interpreter is on"
    folder = tempfile.mkdtemp(prefix="deep_gemm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["DG_JIT_CACHE_DIR"] = folder
    library = installed_deep_gemm()
    refused = library if isinstance(library, Refused) else library.refuses(torch.device("cuda"))
    return None if refused is None else f"deep_gemm {refused.reason}"
