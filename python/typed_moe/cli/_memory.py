"""Refusing a run that this machine's memory cannot hold, before it is tried."""

from __future__ import annotations

import math
from pathlib import Path

from typed_moe.cli._errors import UserError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup/memory.max")
_REST_BYTES = 1 << 30  # torch, one expert in float64, activations


def available_bytes() -> int | None:
    """Memory that a process may still take; None where the system does not say."""
    found: list[int] = []
    if _MEMINFO.is_file():
        rows = dict(line.split(":", 1) for line in _MEMINFO.read_text("ascii").splitlines())
        kilobytes = rows.get("MemAvailable", "").split()
        found += [int(kilobytes[0]) * 1024] if kilobytes else []
    if _CGROUP.is_file():
        limit = _CGROUP.read_text("ascii").strip()
        found += [int(limit)] if limit.isdecimal() else []
    return min(found, default=None)


def check_memory(name: str, need_bytes: int, layer_scale: float) -> None:
    """Refuse weights that do not fit.

    Args:
        name: of the model.
        need_bytes: of its weights, stored and as they are loaded.
        layer_scale: that was asked for.

    Raises:
        UserError: with a scale that fits.
    """
    have, need = available_bytes(), need_bytes + _REST_BYTES
    if have is None or need <= have:
        return
    # Both widths shrink, so the weights do by the square; down to a whole hundredth.
    fits = math.floor(90 * layer_scale * math.sqrt(have / need)) / 100
    raise UserError(
        f"{name} at these widths needs about {need / 2**30:.0f} GiB and this machine has "
        f"{have / 2**30:.0f} GiB free; shrink it, for example with --layer-scale {fits:g}"
    )
