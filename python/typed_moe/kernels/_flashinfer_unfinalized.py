"""Which releases leave the weighted sum to their caller, and in which dtypes."""

from __future__ import annotations

import torch

from typed_moe.kernels import flashinfer_facts as facts
from typed_moe.kernels._flashinfer_library import FlashInferLibrary
from typed_moe.kernels._unfinalized import UnfinalizedRules
from typed_moe.kernels.args import Family, FromLogits, Routing, entry_point
from typed_moe.kernels.flashinfer_versions import parse_version, version_text
from typed_moe.routing import Refused


def unfinalized_rules(
    library: FlashInferLibrary, family: Family, routing: type[Routing]
) -> UnfinalizedRules | Refused:
    """bfloat16, but for the float32 weights of a precomputed call that takes them as such.

    Args:
        library: a release that serves the family.
        family: of the entry points.
        routing: which of the two.
    """
    entry = entry_point(family, routing)
    version = parse_version(library.version)
    assert isinstance(version, tuple), "FlashInferKernel.rules refuses what is no release"
    release = f"flashinfer {library.version}"
    if "do_finalize" not in library.parameters(entry):
        return Refused(
            f"{entry} of {release} has no do_finalize; upgrade it, or call the layer itself, which "
            "adds up"
        )
    since = facts.WEIGHTS_LABELLED[family]
    if routing is FromLogits and version < since:
        return Refused(
            f"{entry} of {release} gives bfloat16 weights that call themselves float32 where the "
            f"logits are (flashinfer#3595); upgrade to {version_text(since)}, or make the layer with "
            "routing_form=RoutingForm.PRECOMPUTED"
        )
    bfloat16 = routing is FromLogits or facts.precomputed_rules(family, version).packed
    return UnfinalizedRules(
        rows_dtype=torch.bfloat16, weights_dtype=torch.bfloat16 if bfloat16 else torch.float32
    )
