"""What a report says of the machine and the versions that it was made with."""

from __future__ import annotations

import importlib.metadata
import platform

import torch


def version_of(distribution: str) -> str | None:
    """Of an installed distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_json(device: torch.device) -> dict[str, object]:
    """Versions, device, compute capability and threads as plain values."""
    return {
        "typed_moe": version_of("typed-moe"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flashinfer": version_of("flashinfer-python"),
        "cuda": torch.version.cuda,
        "device": str(device),
        "device_name": _device_name(device),
        "compute_capability": _capability(device),
        "threads": torch.get_num_threads(),
    }


def machine_rows(device: torch.device) -> list[tuple[str, str]]:
    """The same for people."""
    facts = machine_json(device)
    capability = facts["compute_capability"]
    about = f"compute capability {capability}" if capability else f"{facts['threads']} threads"
    return [
        ("typed-moe", str(facts["typed_moe"] or "from a checkout, not installed")),
        ("python", str(facts["python"])),
        ("torch", f"{facts['torch']}, CUDA {facts['cuda'] or 'none'}"),
        ("flashinfer", str(facts["flashinfer"] or "not installed")),
        ("device", f"{device}, {facts['device_name']}, {about}"),
    ]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.machine()


def _capability(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"
