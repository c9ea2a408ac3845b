"""FlashInfer's release numbers, to compare."""

from __future__ import annotations

import re

from typed_moe.routing import Refused

Version = tuple[int, int, int]
"""Major, minor, patch; a post-release counts as its release."""


def parse_version(text: str) -> Version | Refused:
    """(0, 7, 2) of `0.7.2.post1`, or that the text is no version."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", text)
    if found is None:
        return Refused(f"flashinfer-python calls itself {text!r}, which is no release")
    major, minor, patch = found.groups()
    return int(major), int(minor), int(patch)


def version_text(version: Version) -> str:
    """`0.7.2` of (0, 7, 2)."""
    return ".".join(str(part) for part in version)
