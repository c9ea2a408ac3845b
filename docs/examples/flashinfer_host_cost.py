"""What FlashInfer's own Python costs on the host per call, with its compiled functions left out.

The function that a caller calls checks arguments, allocates, asks the autotuner and then calls a
compiled function. Here that last one does nothing, so that the rest runs on a machine without a
GPU. Run it: `python docs/examples/flashinfer_host_cost.py`. For FlashInfer 0.7.2.post1, whose
private names it replaces.
"""

from __future__ import annotations

import timeit
import warnings
from functools import partial

import torch
from flashinfer import fused_moe
from flashinfer.fused_moe import core

from typed_moe.cli._bench import recorded
from typed_moe.cli._bench_calls import open_library, pairs


class Nothing:
    """In place of the compiled module and of the functions in it."""

    def __getattr__(self, name: str) -> Nothing:
        del name
        return self

    def __call__(self, *args: object, **kwargs: object) -> Nothing:
        del args, kwargs
        return self

    def get_library_paths(self) -> list[str]:
        return []


def main() -> None:
    """Microseconds per call of each entry point, the best of five times 200 calls."""
    warnings.simplefilter("ignore", DeprecationWarning)
    replaced = {
        "gen_trtllm_gen_fused_moe_sm100_module": lambda **_: Nothing(),
        "get_compute_capability": lambda _: (10, 0),
        "device_support_pdl": lambda _: True,
    }
    for name, replacement in replaced.items():
        assert hasattr(core, name), f"this FlashInfer has no fused_moe.core.{name}"
        setattr(core, name, replacement)
    setattr(torch.cuda, "current_device", lambda: 0)  # noqa: B010 - to a type checker it is fixed
    torch.set_grad_enabled(False)
    for pair in pairs(open_library()):
        ((entry, arguments),) = recorded(pair, pair.by_hand, 1)
        function = getattr(fused_moe, entry)
        best = min(timeit.repeat(partial(function, **arguments), number=200, repeat=5))
        print(f"{entry:<36}{1e6 * best / 200:6.1f} µs")


if __name__ == "__main__":
    main()
