"""Build FlashInfer's TensorRT-LLM routing kernels, for a Hopper GPU, from the installed package.

The MoE kernels of ``flashinfer.fused_moe.trtllm_*`` run on Blackwell alone, but the routing kernels
that they start with ask for compute capability 9.0 only. FlashInfer compiles them for 10.x and
12.x; this compiles the same sources, with FlashInfer's own flags, for 9.0a:

    pip install flashinfer-python==0.7.2.post1
    pip download --no-deps flashinfer-cubin==0.6.13
    python -m tests.conformance.build flashinfer_cubin-0.6.13-*.whl --out build

It needs a CUDA toolkit with cuBLAS's headers, ninja and no GPU. Two of the nine files take 20 to 30
minutes of one core each. The wheel of flashinfer-cubin is read for the ``trtllmGen_bmm_export`` headers alone,
which FlashInfer would download. Its set is older than the sources and lacks one enumerator, which
two ``static_assert`` in ``KernelRunner.h`` ask for and the routing kernels do not; FlashInfer's
own switch, ``TLLM_RUBIN_FEATURES``, leaves these two out and does nothing else.

``python -m tests.conformance`` runs what is built here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import zipfile
from pathlib import Path

LIBRARY = "trtllm_gen_routing.so"
EXPORT = "trtllmGen_bmm_export"
DEFINES = (
    "-DTLLM_GEN_EXPORT_INTERFACE",
    "-DTLLM_ENABLE_CUDA",
    "-DENABLE_BF16",
    "-DENABLE_FP8",
    "-DENABLE_FP4",
    "-DTLLM_RUBIN_FEATURES",
)


def unpack_headers(wheel: Path, root: Path) -> Path:
    """Put the wheel's export headers where the sources look for them below ``root``."""
    inner = f"/include/{EXPORT}/"
    target = root / "flashinfer" / "trtllm" / "batched_gemm" / EXPORT
    if not zipfile.is_zipfile(wheel):
        raise SystemExit(f"{wheel}: no such file, or no wheel; pip download flashinfer-cubin")
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if "/batched_gemm-" in n and inner in n]
        if not names:
            raise SystemExit(f"{wheel}: no {EXPORT} headers of batched_gemm in this wheel")
        for name in names:
            path = target / name.split(inner, 1)[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name))
    return root


def build(wheel: Path, out: Path, jobs: int) -> Path:
    """Compile FlashInfer's routing module for compute capability 9.0a into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    os.environ["FLASHINFER_CUDA_ARCH_LIST"] = "9.0a"
    os.environ["FLASHINFER_WORKSPACE_BASE"] = str(out.resolve())
    os.environ["FLASHINFER_JIT_VERBOSE"] = "1"
    os.environ["MAX_JOBS"] = str(jobs)
    # After the settings: FlashInfer reads them when it is imported.
    from flashinfer.jit import env
    from flashinfer.jit.core import gen_jit_spec

    headers = unpack_headers(wheel, out / "headers")
    source = env.FLASHINFER_CSRC_DIR
    kernels = sorted((source / "fused_moe/trtllm_backend").glob("trtllm_fused_moe_routing_*.cu"))
    spec = gen_jit_spec(
        "trtllm_gen_routing",
        [source / "trtllm_fused_moe_routing_binding.cu", *kernels],
        extra_cuda_cflags=[*DEFINES, "-gencode=arch=compute_90a,code=sm_90a"],
        extra_include_paths=[
            source,
            source / "nv_internal",
            source / "nv_internal/include",
            headers,
        ],
    )
    spec.build()
    return Path(shutil.copy(spec.get_library_path(), out / LIBRARY))


def main() -> None:
    parser = argparse.ArgumentParser(description="Build FlashInfer's routing kernels for Hopper.")
    parser.add_argument("cubin_wheel", type=Path, help="flashinfer-cubin's wheel, for its headers")
    parser.add_argument("--out", type=Path, default=Path("build"), help="folder to build in")
    parser.add_argument("--jobs", type=int, default=2, help="files compiled at a time")
    arguments = parser.parse_args()
    print(build(arguments.cubin_wheel, arguments.out, arguments.jobs))


if __name__ == "__main__":
    main()
