"""TYPED_MOE_TILES: a file of tiles that is checked as a whole, and what the kernel does with it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import attrs
import pytest
import torch

from typed_moe import Bf16, Refused, RoutingShape, Swiglu
from typed_moe.config import Placement
from typed_moe.kernels import KernelRequest, TritonKernel, _tile_file, triton_experts
from typed_moe.kernels._expert_tiles import (
    ANY_CARD,
    HOPPER,
    HOPPER_NARROW,
    NARROW,
    ExpertTile,
    GemmTile,
    Operand,
    Table,
    table_of,
)
from typed_moe.kernels._tile_file import own_table, read_tile_file, tile_file_json
from typed_moe.routing import KernelRules

CARD = "NVIDIA L40S"
TILE = ExpertTile(
    block_m=64,
    second_block_m=32,
    first=GemmTile(block_n=128, block_k=128, warps=8, stages=3, group_m=8, tma=True),
    second=GemmTile(block_n=64, block_k=128, warps=4, stages=4),
)
TABLES: Mapping[Operand, Table] = {
    "bf16": ((7.5, HOPPER["bf16"][0][1]), (2.0**31, TILE)),
    "fp8": ((2.0**31, TILE),),
}
REQUEST = KernelRequest(
    shape=RoutingShape(num_experts=16, top_k=4),
    quant=Bf16(),
    activation=Swiglu(),
    placement=Placement(),
    hidden_size=256,
    intermediate_size=256,
    num_fused_shared_experts=0,
    has_bias=False,
    device=torch.device("cuda"),
    dtype=torch.bfloat16,
)


def _clear() -> None:
    for one in (_tile_file._read, triton_experts._table, triton_experts._card):
        one.cache_clear()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing remembered, on a card that Triton runs on."""
    _clear()
    monkeypatch.delenv("TYPED_MOE_TILES", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: CARD)
    monkeypatch.setattr(triton_experts, "fused_routing_refusal", lambda device: None)
    yield
    _clear()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps(tile_file_json(CARD, TABLES)), encoding="utf-8")
    return path


def test_what_is_written_is_read(written: Path) -> None:
    found = read_tile_file(written)
    assert found.card == CARD
    assert dict(found.tables) == TABLES


def test_a_file_from_before_persistent_kernels_asks_for_none(written: Path) -> None:
    """Such a file is as good as it was; what else it lacks is still refused."""
    data = json.loads(written.read_text())
    for table in data["tables"].values():
        for tile in table:
            for name in ("first", "second"):
                assert tile[name].pop("persistent") is False
    written.write_text(json.dumps(data))
    assert dict(read_tile_file(written).tables) == TABLES

    del data["tables"]["fp8"][0]["first"]["tma"]
    written.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"fp8\[0\].first lacks 'tma'"):
        read_tile_file(written)


@pytest.mark.parametrize(
    "tables", [HOPPER, HOPPER_NARROW, ANY_CARD], ids=["hopper", "hopper narrow", "any"]
)
def test_the_built_in_tables_could_be_a_file(
    tables: Mapping[Operand, Table], tmp_path: Path
) -> None:
    """The reader refuses none of what the package ships."""
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps(tile_file_json(CARD, tables)), encoding="utf-8")
    assert dict(read_tile_file(path).tables) == dict(tables)


def test_narrow_layers_have_their_own() -> None:
    """On the cards that have such a table, for the operands in it."""
    card = "NVIDIA H100 80GB HBM3"
    assert table_of(card, "bf16", NARROW) == HOPPER_NARROW["bf16"]
    assert table_of(card, "bf16", NARROW + 8) == HOPPER["bf16"]
    assert table_of(card, "fp8", NARROW) == HOPPER["fp8"]
    assert table_of(CARD, "bf16", NARROW) == ANY_CARD["bf16"]


def test_the_kernel_takes_it(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the operands that it has; the built-in table for the others, and without it."""
    device = torch.device("cuda")
    assert triton_experts._table(device, "bf16", 2048) == table_of(CARD, "bf16", 2048)
    _clear()
    monkeypatch.setenv("TYPED_MOE_TILES", str(written))
    assert triton_experts._table(device, "bf16", 2048) == TABLES["bf16"]
    assert isinstance(TritonKernel().rules(REQUEST), KernelRules)

    data = json.loads(written.read_text())
    del data["tables"]["bf16"]
    written.write_text(json.dumps(data))
    _clear()
    assert triton_experts._table(device, "bf16", 2048) == table_of(CARD, "bf16", 2048)
    assert triton_experts._table(device, "fp8", 2048) == TABLES["fp8"]


def test_another_cards_file_is_refused(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the layer is made, by the plan; a kernel with a tile of its own does not read it."""
    monkeypatch.setenv("TYPED_MOE_TILES", str(written))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    refused = TritonKernel().rules(REQUEST)
    assert isinstance(refused, Refused)
    assert "was measured on NVIDIA L40S, and this card is NVIDIA A100-SXM4-80GB" in refused.reason
    assert "typed-moe tune" in refused.reason
    assert isinstance(TritonKernel(tile=TILE).rules(REQUEST), KernelRules)
    with pytest.raises(ValueError, match="was measured on"):
        own_table("NVIDIA A100-SXM4-80GB", "bf16")


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "3"])
def test_a_file_that_is_none_is_a_sentence(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiles.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("TYPED_MOE_TILES", str(path))
    refused = TritonKernel().rules(REQUEST)
    assert isinstance(refused, Refused)
    assert refused.reason.startswith(f"TYPED_MOE_TILES={path}")


Data = dict[str, object]


def _tile(data: Data) -> Data:
    tables = data["tables"]
    assert isinstance(tables, dict)
    tile = tables["fp8"][0]
    assert isinstance(tile, dict)
    return tile


def _renamed(first: Data, data: Data) -> None:
    """A persistent first product, in a table of fp4."""
    first["persistent"] = True
    tables = data["tables"]
    assert isinstance(tables, dict)
    tables["fp4"] = tables.pop("fp8")


def _first(data: Data) -> Data:
    first = _tile(data)["first"]
    assert isinstance(first, dict)
    return first


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.pop("card"), "lacks 'card'"),
        (lambda data: data.update(card=""), "card is ''; allowed: the card's name"),
        (lambda data: data.update(typed_moe_tiles=2), "typed_moe_tiles is 2; allowed: 1"),
        (lambda data: data.update(tables=[]), "tables is a JSON list; allowed: an object"),
        (lambda data: data["tables"].update(int3=[]), "tables has 'int3'; allowed: bf16, fp8"),
        (lambda data: data["tables"].update(bf16=[]), "the table of bf16 is []; allowed: a list"),
        (lambda data: data["tables"]["bf16"].reverse(), "allowed: rising, and null at the end"),
        (lambda data: data["tables"]["bf16"].pop(), "allowed: rising, and null at the end"),
        (lambda data: _tile(data).update(rows_per_expert=0), "rows_per_expert is 0; allowed"),
        (lambda data: _tile(data).update(rows_per_expert=True), "rows_per_expert is True; allowed"),
        (lambda data: _tile(data).update(block_m=48), "fp8[0].block_m is 48; allowed: (16, 32"),
        (lambda data: _tile(data).update(second_block_m=128), "second_block_m is 128; allowed"),
        (lambda data: _tile(data).update(block=1), "fp8[0] has 'block'; it has block_m, first"),
        (lambda data: _first(data).pop("stages"), "fp8[0].first lacks 'stages'"),
        (lambda data: _first(data).update(stages=0), "first.stages is 0; allowed: 1 to 8"),
        (lambda data: _first(data).update(warps=3), "first.warps is 3; allowed: (1, 2, 4, 8, 16)"),
        (lambda data: _first(data).update(warps=True), "first.warps is True; allowed"),
        (lambda data: _first(data).update(warps="4"), "first.warps is '4'; allowed"),
        (lambda data: _first(data).update(tma=1), "first.tma is 1; allowed: true and false"),
        (lambda data: _first(data).update(persistent=1), "first.persistent is 1; allowed: true"),
        (
            lambda data: _first(data).update(persistent=True),
            "is persistent with block_m 64, second_block_m 32 and block_n 128; allowed: 128 each",
        ),
        (
            lambda data: _renamed(_first(data), data),
            "fp4[0].first.persistent is true in fp4; allowed: false, but in bf16 and fp8",
        ),
        (
            lambda data: _first(data).update(block_k=64),
            "block_k 64 and block_n 128; allowed in fp8",
        ),
        (lambda data: _first(data).update(block_n=256), "block_n 256; allowed in fp8"),
    ],
)
def test_anything_wrong_refuses_the_file(
    change: Callable[[Data], object], said: str, written: Path
) -> None:
    """With what is allowed; nothing of it is used."""
    data = copy.deepcopy(json.loads(written.read_text()))
    change(data)
    written.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="typed-moe tune writes such files") as raised:
        read_tile_file(written)
    assert said in str(raised.value)


def test_what_fits_an_operand(tmp_path: Path) -> None:
    """Blocks of eight rows for MX and FP4 weights alone, and FP4 in steps of 64 values and more."""
    path = tmp_path / "tiles.json"

    def read(operand: Operand, block_k: int) -> ExpertTile:
        gemm = GemmTile(block_n=64, block_k=block_k, warps=4, stages=3)
        tile = ExpertTile(block_m=8, first=gemm, second=gemm)
        path.write_text(json.dumps(tile_file_json(CARD, {operand: ((2.0**31, tile),)})))
        return read_tile_file(path).tables[operand][0][1]

    assert read("fp4", 64).block_m == read("mxfp8", 32).block_m == 8
    with pytest.raises(ValueError, match=r"bf16\[0\].block_m is 8; allowed: \(16, 32"):
        read("bf16", 64)
    with pytest.raises(ValueError, match="first has block_k 32; allowed in fp4: 64 and above"):
        read("fp4", 32)


def test_a_tile_is_a_value() -> None:
    """Equal files give equal tiles, which the search counts on."""
    assert attrs.evolve(TILE) == TILE
    assert hash(attrs.evolve(TILE)) == hash(TILE)
