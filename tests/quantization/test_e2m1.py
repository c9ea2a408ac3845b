"""E2M1 by its whole table: sixteen codes, their ties, and the order of the nibbles."""

from __future__ import annotations

import pytest
import torch

from tests.quantization import grids
from typed_moe.quantization._e2m1 import e2m1_decode, e2m1_encode, pack_nibbles, unpack_nibbles

TABLE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
SIGNED = TABLE + [-value for value in TABLE]

# Each middle between two neighbours and the code it goes to: the even one of the two.
TIES = [(0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6)]


def test_decode_table() -> None:
    """The sixteen codes mean what the OCP specification lists, minus zero included."""
    decoded = e2m1_decode(torch.arange(16, dtype=torch.uint8))

    assert decoded.tolist() == SIGNED
    assert bool(torch.signbit(decoded)[8])


def test_encode_inverts_decode() -> None:
    """Each of the sixteen values goes back to its own code."""
    codes = e2m1_encode(torch.tensor(SIGNED))

    assert codes.tolist() == list(range(16))


@pytest.mark.parametrize(("value", "code"), TIES)
def test_ties_go_to_the_even_code(value: float, code: int) -> None:
    """A middle goes to the even code, one float32 below and above it to its neighbours."""
    middle = torch.tensor(value)
    below = torch.nextafter(middle, torch.tensor(0.0))
    above = torch.nextafter(middle, torch.tensor(9.0))
    lower = int(grids.nearest_code(below, grids.E2M1))

    encoded = e2m1_encode(torch.stack((below, middle, above)))

    assert encoded.tolist() == [lower, code, lower + 1]
    assert e2m1_encode(-middle).item() == code + 8


def test_encode_agrees_with_a_search() -> None:
    """On 100,000 values of every size the arithmetic agrees with a search in float64."""
    values = torch.randn(100_000) * torch.exp2(torch.randint(-20, 4, (100_000,)))

    expected = grids.nearest_code(values, grids.E2M1) + 8 * (values < 0)

    assert torch.equal(e2m1_encode(values).long(), expected)


def test_encode_saturates() -> None:
    """Beyond 6, infinity included, is 6; a NaN has no code and gives a zero."""
    values = torch.tensor([6.5, 1e30, torch.inf, -torch.inf, torch.nan])

    assert (e2m1_encode(values) & 7).tolist() == [7, 7, 7, 7, 0]
    assert e2m1_encode(values)[3].item() == 15


def test_low_nibble_is_the_even_index() -> None:
    """Codes 1, 2 pack to 0x21, and every byte unpacks to what packs back to it."""
    assert pack_nibbles(torch.tensor([1, 2, 15, 0], dtype=torch.uint8)).tolist() == [0x21, 0x0F]

    every_byte = torch.arange(256, dtype=torch.uint8)
    unpacked = unpack_nibbles(every_byte)

    assert torch.equal(unpacked.long(), grids.codes(every_byte))
    assert torch.equal(pack_nibbles(unpacked), every_byte)
