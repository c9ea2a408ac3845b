"""The tables of FlashInfer's releases against what is known of them, the stub and the library.

The expectations are written by hand, by FlashInfer's own release numbers: the release that brought
an entry point or an argument need not be one of the ten that have a table. Where that release is
not known, the first table after it stands in.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from types import ModuleType

import pytest

from tests.kernels import extract_signatures, signatures
from tests.kernels.signatures import VERSIONS, Table, by_release, table

STUBS = Path(__file__).parents[2] / "stubs" / "flashinfer"
# The release that stubs/ describes.
STUBBED = "0.7.2.post1"
ALWAYS, NEVER = "0", "999"

# --- entry points ---

BROUGHT_BY = {
    "fp8_per_tensor_scale": "0.2.8",
    "fp8_block_scale": "0.2.8",
    "fp4_block_scale": "0.2.9",
    "fp4_block_scale_routed": "0.2.10",
    "bf16": "0.5.3",
    "mxint4_block_scale": "0.6.0",
    "fp8_block_scale_routed": "0.6.3",
    "bf16_routed": "0.6.5",
    "mxint4_block_scale_routed": "0.6.13",
    "fp8_per_tensor_scale_routed": "0.6.17",
    "fp8_per_channel_scale": "0.7.0",
    "fp8_per_channel_scale_routed": "0.7.0",
}
# Arguments by position or name, and by name alone, in 0.7.2.post1.
COUNTS = {
    "bf16": (26, 0),
    "bf16_routed": (25, 0),
    "fp8_per_tensor_scale": (26, 0),
    "fp8_per_tensor_scale_routed": (25, 0),
    "fp8_per_channel_scale": (26, 0),
    "fp8_per_channel_scale_routed": (25, 0),
    "fp8_block_scale": (33, 2),
    "fp8_block_scale_routed": (31, 0),
    "fp4_block_scale": (37, 0),
    "fp4_block_scale_routed": (36, 0),
    "mxint4_block_scale": (27, 0),
    "mxint4_block_scale_routed": (25, 0),
}
FP4 = ("fp4_block_scale", "fp4_block_scale_routed")
BLOCK = ("fp8_block_scale", "fp8_block_scale_routed")
PER_TENSOR = ("fp8_per_tensor_scale", "fp8_per_tensor_scale_routed")
PER_CHANNEL = ("fp8_per_channel_scale", "fp8_per_channel_scale_routed")
BF16 = ("bf16", "bf16_routed")
MXINT4 = ("mxint4_block_scale", "mxint4_block_scale_routed")
LOGITS = tuple(name for name in COUNTS if not name.endswith("_routed"))
ROUTED = tuple(name for name in COUNTS if name.endswith("_routed"))


def since(release: str, *names: str) -> dict[str, tuple[str, str]]:
    """From a release on."""
    return dict.fromkeys(names, (release, NEVER))


def until(release: str, *names: str) -> dict[str, tuple[str, str]]:
    """Up to a release, which no longer has it."""
    return dict.fromkeys(names, (ALWAYS, release))


# Which entry points have an argument, from which release on and up to which. An entry point that is
# not named never has it; one that came later than the release here has it from its start.
ARGUMENTS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "routing_logits": since(ALWAYS, *LOGITS),
    "topk_ids": since(ALWAYS, *ROUTED),
    "routing_bias": since(ALWAYS, *LOGITS, *FP4, *BLOCK, *PER_TENSOR, *PER_CHANNEL),
    "routed_scaling_factor": since(ALWAYS, *COUNTS) | since("0.6.0", "bf16"),
    "routing_method_type": since(ALWAYS, *COUNTS),
    "use_routing_scales_on_input": since(ALWAYS, *PER_TENSOR, *PER_CHANNEL),
    "tile_tokens_dim": until("0.6.0", *FP4, "fp8_block_scale", "fp8_per_tensor_scale"),
    "tune_max_num_tokens": since(ALWAYS, *COUNTS)
    | since("0.5.2", "fp8_block_scale", "fp8_per_tensor_scale"),
    "gated_act_type": until("0.6.3", *FP4),
    "activation_type": since("0.6.3", *FP4, *PER_TENSOR, *PER_CHANNEL)
    | since("0.6.7", *BLOCK)
    | since("0.6.8", *BF16),
    "do_finalize": since(ALWAYS, *COUNTS)
    | since("0.6.5", *BF16, *BLOCK, "fp8_per_tensor_scale", "mxint4_block_scale"),
    "fp8_quantization_type": since("0.6.4", *BLOCK),
    "norm_topk_prob": since("0.6.8", *LOGITS),
    "routing_replay_out": since(
        "0.6.8", *BF16, *PER_TENSOR, "fp8_block_scale", "fp4_block_scale", "mxint4_block_scale"
    ),
    "per_token_scale": since("0.6.11", *FP4),
    "output": since(ALWAYS, *FP4, *MXINT4, *BLOCK, *PER_TENSOR)
    | since("0.6.14", *BF16, "fp8_block_scale", "fp8_per_tensor_scale"),
    "num_fused_shared_experts": since("0.6.15", "fp8_block_scale")
    | since("0.6.17", "fp4_block_scale")
    | since("0.7.0", "fp4_block_scale_routed"),
    "gemm1_lora_delta": since("0.6.13", "bf16_routed", *BLOCK[1:], *MXINT4[1:])
    | since("0.6.18", "fp4_block_scale_routed"),
    "gemm1_alpha": since(ALWAYS, *FP4, *MXINT4) | since("0.6.13", *BF16, *BLOCK),
    "gemm1_beta": since(ALWAYS, *FP4, *MXINT4) | since("0.6.13", *BF16, *BLOCK),
    "gemm1_clamp_limit": since(ALWAYS, *FP4, *MXINT4)
    | since("0.6.13", *BF16, *BLOCK)
    | since("0.7.2.post1", *PER_TENSOR),
    "gemm1_bias": since(ALWAYS, *FP4) | since("0.7.0", "fp8_block_scale"),
    "gemm2_bias": since(ALWAYS, *FP4) | since("0.7.0", "fp8_block_scale"),
    "valid_hidden_size": since("0.7.0", *FP4, *BLOCK, *MXINT4),
    "valid_intermediate_size": since("0.7.0", *FP4, *BLOCK, *MXINT4),
    "hidden_states_scale_layout": since("0.7.0", *FP4),
}


def entry_points(version: str) -> dict[str, inspect.Signature]:
    """By what stands between `trtllm_` and `_moe`."""
    return {
        name.removeprefix("trtllm_").removesuffix("_moe"): signature
        for name, signature in table(version).functions.items()
    }


def within(version: str, span: tuple[str, str]) -> bool:
    """From the first release of a span on, and before the second."""
    return by_release(span[0]) <= by_release(version) < by_release(span[1])


def test_the_ten_versions() -> None:
    expected = "0.5.0 0.5.3 0.6.0 0.6.3 0.6.7 0.6.8 0.6.12 0.6.18 0.7.0 0.7.2.post1"

    assert " ".join(VERSIONS) == expected
    assert all(table(version).version == version for version in VERSIONS)


@pytest.mark.parametrize("version", VERSIONS)
def test_entry_points_by_version(version: str) -> None:
    expected = {name for name, release in BROUGHT_BY.items() if within(version, (release, NEVER))}

    assert set(entry_points(version)) == expected


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_arguments_by_version(argument: str) -> None:
    """Where an argument is, and nowhere else."""
    spans = ARGUMENTS[argument]
    found = {
        (version, name)
        for version in VERSIONS
        for name, signature in entry_points(version).items()
        if argument in signature.parameters
    }
    expected = {
        (version, name)
        for version in VERSIONS
        for name in entry_points(version)
        if within(version, spans.get(name, (NEVER, NEVER)))
    }

    assert found == expected


def test_nothing_else_ever_came_or_went() -> None:
    """What ARGUMENTS does not name, an entry point has in every version that has it."""
    for name in COUNTS:
        ever = [set(entry_points(v)[name].parameters) for v in VERSIONS if name in entry_points(v)]
        changed = {argument for some in ever for argument in ever[-1] ^ some}

        assert changed <= set(ARGUMENTS), name


@pytest.mark.parametrize("name", COUNTS)
def test_number_of_arguments(name: str) -> None:
    kinds = [one.kind for one in entry_points(STUBBED)[name].parameters.values()]

    assert (
        kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD),
        kinds.count(inspect.Parameter.KEYWORD_ONLY),
    ) == COUNTS[name]


@pytest.mark.parametrize(
    ("name", "argument", "position", "before", "after"),
    [
        ("bf16", "routed_scaling_factor", 12, "0.5.3", "0.6.0"),
        ("bf16", "do_finalize", 16, "0.6.3", "0.6.7"),
        ("bf16_routed", "gemm1_lora_delta", 17, "0.6.12", "0.6.18"),
        ("fp8_per_tensor_scale", "do_finalize", 18, "0.6.3", "0.6.7"),
        ("fp8_block_scale", "do_finalize", 19, "0.6.3", "0.6.7"),
        ("fp8_block_scale_routed", "do_finalize", 19, "0.6.3", "0.6.7"),
        ("fp8_block_scale", "num_fused_shared_experts", 23, "0.6.12", "0.6.18"),
        ("fp8_block_scale_routed", "gemm1_lora_delta", 21, "0.6.12", "0.6.18"),
        ("fp4_block_scale", "per_token_scale", 28, "0.6.8", "0.6.12"),
        ("fp4_block_scale_routed", "per_token_scale", 28, "0.6.8", "0.6.12"),
        ("mxint4_block_scale", "do_finalize", 19, "0.6.3", "0.6.7"),
    ],
)
def test_arguments_that_moved_others(
    name: str, argument: str, position: int, before: str, after: str
) -> None:
    """Inserted in the middle: the same call by position means something else. Call by name."""
    older, newer = (list(entry_points(version)[name].parameters) for version in (before, after))

    assert newer[position] == argument
    assert older[:position] == newer[:position]
    assert older[position] == newer[position + 1]


def defaults(version: str, argument: str) -> dict[str, object]:
    """The default of an argument in each entry point that has it."""
    return {
        name: signature.parameters[argument].default
        for name, signature in entry_points(version).items()
        if argument in signature.parameters
    }


def test_defaults_that_differ_between_entry_points() -> None:
    """Of 0.7.2.post1; 2 is BlockMajorK."""
    required = inspect.Parameter.empty

    assert defaults(STUBBED, "enable_pdl") == dict.fromkeys(COUNTS) | dict.fromkeys(BF16, True)
    assert defaults(STUBBED, "use_shuffled_weight") == dict.fromkeys(BF16, True) | dict.fromkeys(
        BLOCK, False
    )
    assert defaults(STUBBED, "weight_layout") == dict.fromkeys(BF16, 2) | dict.fromkeys(BLOCK, 0)
    assert defaults(STUBBED, "use_routing_scales_on_input") == dict.fromkeys(
        [*PER_TENSOR, *PER_CHANNEL], required
    ) | {"fp8_per_channel_scale_routed": False}
    # A required `tile_tokens_dim` came and went per entry point.
    assert defaults("0.5.0", "tile_tokens_dim") == dict.fromkeys(FP4, required) | {
        "fp8_block_scale": None,
        "fp8_per_tensor_scale": 8,
    }
    assert defaults("0.5.3", "tile_tokens_dim") == dict.fromkeys(FP4, required) | {
        "fp8_block_scale": None,
        "fp8_per_tensor_scale": None,
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_defaults_that_never_differ(version: str) -> None:
    """Default, 0, is the method of whoever names none; 3 is Swiglu."""
    for argument, value in (
        ("routing_method_type", 0),
        ("do_finalize", True),
        ("tune_max_num_tokens", 8192),
        ("activation_type", 3),
        ("norm_topk_prob", True),
        ("fp8_quantization_type", 1),
    ):
        assert set(defaults(version, argument).values()) <= {value}, argument


def test_a_signature_binds_as_the_release_would() -> None:
    """0.6.12 takes no output buffer in the bf16 entry point, 0.6.18 does."""
    required = {
        name: None
        for name, one in entry_points("0.6.12")["bf16"].parameters.items()
        if one.default is one.empty
    }
    entry_points("0.6.12")["bf16"].bind(**required)
    entry_points("0.6.18")["bf16"].bind(**required, output=None)
    with pytest.raises(TypeError, match="'output'"):
        entry_points("0.6.12")["bf16"].bind(**required, output=None)
    with pytest.raises(TypeError, match="'top_k'"):
        entry_points("0.6.18")["bf16"].bind(**required | {"routing_logits": None}, top_k=None)


# --- enums ---

# The numbers are the positions. From a release on, until the next line.
FIRST_METHODS = ("Default", "Renormalize", "DeepSeekV3", "Llama4", "RenormalizeNaive", "TopK")
METHODS = (
    ("0.2.14", (*FIRST_METHODS, "Unspecified")),
    ("0.6.8", (*FIRST_METHODS, "SigmoidRenorm", "MiniMax2", "Unspecified")),
    ("0.6.11", (*FIRST_METHODS, "SigmoidRenorm", "MiniMax2", "Sigmoid", "Unspecified")),
    (
        "0.6.18",
        (*FIRST_METHODS, "SigmoidRenorm", "MiniMax2", "Sigmoid", "TopKSigmoid", "Unspecified"),
    ),
)
# Identity was 7, which is SwigluStep now: activations were renumbered too.
FIRST_ACTIVATIONS = ("Gelu", "Relu", "Silu", "Swiglu", "Geglu", "SwigluBias", "Relu2")
NEW_ACTIVATIONS = ("SwigluStep", "GegluTanh", "Identity", "Situ", "InvalidType")
ACTIVATIONS = (
    (ALWAYS, (*FIRST_ACTIVATIONS, "Identity", "InvalidType")),
    ("0.6.18", (*FIRST_ACTIVATIONS, *NEW_ACTIVATIONS)),
    ("0.7.2.post1", (*FIRST_ACTIVATIONS, *NEW_ACTIVATIONS, "ClampedRelu2")),
)
FP8_TYPES = (
    ("0.6.4", ("NoneFp8", "DeepSeekFp8", "MxFp8")),
    ("0.7.0", ("NoneFp8", "DeepSeekFp8", "MxFp8", "PerTensorFp8", "PerChannelFp8")),
)
ENUMS = {
    "RoutingMethodType": METHODS,
    "ActivationType": ACTIVATIONS,
    "Fp8QuantizationType": FP8_TYPES,
    "WeightLayout": ((ALWAYS, ("MajorK", "MajorMn", "BlockMajorK")),),
    "RoutingInputMode": (("0.6.12", ("FromLogits", "PackedPrecomputed", "UnpackedPrecomputed")),),
    "SfLayout": (("0.6.7", ("layout_128x4", "layout_8x4", "layout_linear")),),
    # Not in 0.6.3; back, and unused, from 0.6.7.
    "GatedActType": ((ALWAYS, ("SwiGlu", "GeGlu")), ("0.6.3", ()), ("0.6.7", ("SwiGlu", "GeGlu"))),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ENUMS)
def test_numbers_by_version(name: str, version: str) -> None:
    past = [members for release, members in ENUMS[name] if within(version, (release, NEVER))]
    members = past[-1] if past else ()

    assert table(version).enums.get(name, {}) == {
        member: number for number, member in enumerate(members)
    }


# --- the stub, without the library ---


@pytest.fixture(scope="module")
def stub() -> Table:
    """stubs/flashinfer, read as a wheel's sources are."""
    files = (STUBS / "fused_moe" / "core.pyi", STUBS / "tllm_enums.pyi")
    return signatures.from_json(
        extract_signatures.table(STUBBED, [file.read_text() for file in files])
    )


def test_the_stub_has_the_signatures_of_its_release(stub: Table) -> None:
    assert stub.functions == table(STUBBED).functions


def test_the_stub_has_the_numbers_of_its_release(stub: Table) -> None:
    """stubtest compares names, not numbers."""
    assert stub.enums == table(STUBBED).enums


# --- the library, where it is installed ---


@pytest.fixture(scope="module")
def flashinfer() -> ModuleType:
    """The installed library."""
    module: ModuleType = pytest.importorskip(
        "flashinfer", reason="flashinfer cannot be imported here", exc_type=ImportError
    )
    return module


@pytest.fixture(scope="module")
def installed(flashinfer: ModuleType) -> Table:
    """The table of the installed version."""
    version: object = flashinfer.__version__
    if version not in VERSIONS:
        pytest.skip(f"no table of flashinfer {version}; `extract_signatures.py` writes one")
    return table(str(version))


def without_annotations(signature: inspect.Signature) -> inspect.Signature:
    """What a table holds of a signature."""
    return inspect.Signature(
        [one.replace(annotation=one.empty) for one in signature.parameters.values()]
    )


def test_the_table_is_what_the_installed_functions_say(installed: Table) -> None:
    module = importlib.import_module("flashinfer.fused_moe")
    for name, signature in installed.functions.items():
        assert without_annotations(inspect.signature(getattr(module, name))) == signature, name


def numbers(chosen: object) -> dict[str, int]:
    """The members of an enum class, aliases included."""
    assert isinstance(chosen, type)
    assert issubclass(chosen, IntEnum)
    return {name: int(member) for name, member in chosen.__members__.items()}


def test_the_table_is_what_the_installed_enums_say(installed: Table) -> None:
    module = importlib.import_module("flashinfer.tllm_enums")
    for name, expected in installed.enums.items():
        assert numbers(getattr(module, name)) == expected, name


def stub_of(version: str, file: str) -> list[ast.stmt]:
    """What a file of the stub declares, if it describes the installed version."""
    if version != STUBBED:
        pytest.skip(f"the stub describes flashinfer {STUBBED}; this is {version}")
    return ast.parse((STUBS / file).read_text()).body


def test_enums_of_the_stub_are_the_installed_ones(installed: Table) -> None:
    """SfLayout too, which is in no table. stubtest passes members that do not exist."""
    module = importlib.import_module("flashinfer.tllm_enums")
    for line in stub_of(installed.version, "tllm_enums.pyi"):
        if isinstance(line, ast.ClassDef):
            expected = numbers(getattr(module, line.name))
            assert dict(extract_signatures.members(line)) == expected, line.name


@pytest.mark.parametrize("package", ["flashinfer", "flashinfer.fused_moe"])
def test_the_stub_re_exports_what_the_package_does(package: str, installed: Table) -> None:
    """stubtest does not look at names that come from another stubbed module."""
    file = "/".join([*package.split(".")[1:], "__init__.pyi"])
    for line in stub_of(installed.version, file):
        if isinstance(line, ast.ImportFrom) and (line.module or "").startswith("flashinfer"):
            source = importlib.import_module(line.module or "")
            for name in (alias.name for alias in line.names):
                here = getattr(importlib.import_module(package), name)
                assert here is getattr(source, name), name
