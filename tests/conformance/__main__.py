"""FlashInfer's routing kernels against every strategy, as the tables of docs/conformance.md.

    python -m tests.conformance --library build/trtllm_gen_routing.so

The library is made by `python -m tests.conformance.build`. Exit status 1 if the kernels do
anything that the strategies and the capability table (`kernels/flashinfer_facts.py`) do not say.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from tests.acceptance.cases import find
from tests.conformance import differences, report, runs
from tests.conformance.kernels import Kernel, in_a_process, load, poison
from tests.conformance.sizes import Planned, grouped, planned
from typed_moe import InKernel

BIASED = (find("MiniMax2"), find("DeepSeekV3-Kimi"), grouped(256, 8, 8, 4))
BATCHES = (4, 300)


def main() -> int:
    """Print the tables, and what is not as stated."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, required=True, help="trtllm_gen_routing.so")
    library = parser.parse_args().library
    if not library.is_file():
        parser.error(f"{library}: no such file; make it with python -m tests.conformance.build")
    if not torch.cuda.is_available():
        parser.error("no CUDA device on this machine; the kernels need one, of Hopper's generation")
    started = time.monotonic()
    found = _run(load(library), library)
    print(
        f"{torch.cuda.get_device_name()}, {datetime.now(UTC):%Y-%m-%d}, torch "
        f"{torch.__version__}, flashinfer-python {version('flashinfer-python')}, "
        f"{time.monotonic() - started:.0f} s\n"
    )
    print(report.tables(found))
    failed = report.failures(found)
    print("\n".join(failed) if failed else "Nothing is otherwise than stated.")
    return 1 if failed else 0


def _run(kernel: Kernel, library: Path) -> report.Found:
    """All calls; sizes beyond the kernels' own come last, since they may do anything."""
    device = torch.device("cuda")
    poison()
    plans = planned()
    taken = [plan for plan in plans if isinstance(plan.told, InKernel)]
    limits = [(plan, runs.refuses(kernel, plan, device)) for plan in taken]
    running = [plan for plan, said in limits if said is None]
    agreements: list[runs.Agreement] = []
    for number, plan in enumerate(running):
        agreements += runs.agreements(kernel, plan, device)
        print(f"\r{number + 1} of {len(running)}", end="", file=sys.stderr, flush=True)
    broken = [
        (plan, differences.broken_rows(kernel, plan, device, tokens))
        for plan in running
        if _several(plan)
        for tokens in BATCHES
    ]
    rounded = differences.rounded_bias(kernel, BIASED[-1], device)
    limits += [(plan, runs.refuses(kernel, plan, device)) for plan in plans if plan not in taken]
    null = [(case, in_a_process(differences.null_bias, library, case)) for case in BIASED]
    return report.Found(
        agreements=agreements, limits=limits, broken=broken, rounded=rounded, null=null
    )


def _several(plan: Planned) -> bool:
    """A row with one NaN tells something where more than it is chosen."""
    return plan.case.top_k > 1 or plan.case.id == "Llama4"


if __name__ == "__main__":
    sys.exit(main())
