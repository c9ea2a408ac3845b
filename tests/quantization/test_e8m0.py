"""E8M0 exponent bytes: the floor rule from the float's bits, and every byte's meaning."""

from __future__ import annotations

import math

import torch

from tests.quantization import grids
from typed_moe.quantization._e8m0 import e8m0_decode, e8m0_from_amax, e8m0_reciprocal

EVERY_BYTE = torch.arange(256).to(torch.uint8)


def test_decode_every_byte() -> None:
    """Each byte means 2^(byte - 127), 2^-127 and 2^127 included, and 255 is NaN."""
    decoded = e8m0_decode(EVERY_BYTE).double()

    assert torch.equal(decoded[:255], grids.e8m0(EVERY_BYTE)[:255])
    assert bool(decoded[255].isnan())


def test_decode_agrees_with_torch() -> None:
    """torch's own float8_e8m0fnu reads the bytes alike."""
    expected = EVERY_BYTE.view(torch.float8_e8m0fnu).to(torch.float32)

    assert torch.equal(e8m0_decode(EVERY_BYTE)[:255], expected[:255])


def test_reciprocal_is_exact() -> None:
    """For each byte that a finite group can have, the reciprocal times the scale is one."""
    reachable = EVERY_BYTE[:253]

    product = e8m0_reciprocal(reachable).double() * grids.e8m0(reachable)

    assert bool((product == 1.0).all())
    assert bool(e8m0_reciprocal(EVERY_BYTE[255:]).isnan().all())


def test_floor_rule_around_every_power_of_two() -> None:
    """At each power of two, and one float32 beside it, the byte is frexp's exponent's."""
    powers = torch.tensor([2.0**exponent for exponent in range(-149, 128)])
    zero, top = torch.tensor(0.0), torch.tensor(torch.inf)
    amax = torch.cat((powers, torch.nextafter(powers, zero), torch.nextafter(powers, top)))
    amax = amax[amax > 0]
    for largest_exponent in (2, 8):
        expected = [
            max(0, math.frexp(value)[1] - 1 - largest_exponent + 127) for value in amax.tolist()
        ]

        assert e8m0_from_amax(amax, largest_exponent).tolist() == expected


def test_zero_and_non_finite_groups() -> None:
    """A group of zeros has the smallest scale, one with a NaN or an infinity has NaN."""
    amax = torch.tensor([0.0, torch.inf, torch.nan])

    assert e8m0_from_amax(amax, 8).tolist() == [0, 255, 255]
