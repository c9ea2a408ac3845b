"""transformers models at a tiny size, with gates and biases that make routing matter."""

from __future__ import annotations

import functools
import math
import warnings
from pathlib import Path
from types import ModuleType
from typing import Protocol, final

import attrs
import torch
from torch import Tensor, nn

from tests.hf._cases import Case
from tests.hf._families import BASE, VISION, VOCABULARY, Family, Settings
from tests.models.hf import hf_config, quiet_import
from typed_moe import moe_layer_ids
from typed_moe.models import HasToDict

GATE_SPREAD = 2.0
"""Standard deviation of the router logits, whose input has an RMS of 1."""
BIAS_SPREAD = 0.3
"""Of the correction biases: the scores of such logits spread as much."""
NEW_TOKENS = 32


class Output(Protocol):
    """What a causal language model gives."""

    logits: Tensor


class CausalLM(Protocol):
    """The members of a transformers model that these tests use."""

    def __call__(self, input_ids: Tensor) -> Output: ...

    def generate(
        self, inputs: Tensor, *, do_sample: bool, min_new_tokens: int, max_new_tokens: int
    ) -> Tensor: ...

    def get_submodule(self, target: str) -> nn.Module: ...

    def set_submodule(self, target: str, module: nn.Module) -> None: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def save_pretrained(self, save_directory: str) -> None: ...


@final
@attrs.frozen(kw_only=True, eq=False)
class Model:
    """One model of one case.

    Attributes:
        case: which.
        config: what the model was built from.
        module: the model.
        layers: the MoE layers that have a learned router.
    """

    case: Case
    config: HasToDict
    module: CausalLM
    layers: tuple[int, ...]

    def path(self, layer: int) -> str:
        """Of a layer's MoE block."""
        return f"{self.case.family.layers}.{layer}.{self.case.family.block}"

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, S, V) after every token."""
        with torch.no_grad():
            return self.module(tokens).logits

    def greedy(self, prompt: Tensor) -> Tensor:
        """(B, NEW_TOKENS) greedily chosen tokens."""
        grown = self.module.generate(
            prompt, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS
        )
        return grown[:, prompt.shape[1] :]


def config_of(family: Family, settings: Settings) -> HasToDict:
    """The config object that the family's model takes."""
    text = {**BASE, **family.settings, **settings}
    if family.config_class is None:
        return hf_config(family.model_type, **text)
    module = quiet_import(f"transformers.models.{family.folder}.configuration_{family.folder}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, about defaults
        config: HasToDict = getattr(module, family.config_class)(
            text_config=text, vision_config=dict(VISION)
        )
    return config


def _modeling(family: Family) -> ModuleType:
    return quiet_import(f"transformers.models.{family.folder}.modeling_{family.folder}")


@functools.cache
def model_of(case: Case) -> Model:
    """The case's model, the same for every test of a process; a test leaves it as it was."""
    family = case.family
    config = config_of(family, case.settings)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, about defaults
        module = getattr(_modeling(family), family.model_class)._from_config(
            config,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    module.eval().requires_grad_(False)
    model = Model(
        case=case,
        config=config,
        module=module,
        layers=tuple(i for i in moe_layer_ids(config) if i not in family.hash_layers),
    )
    for layer in moe_layer_ids(config):
        _make_routing_matter(module.get_submodule(model.path(layer)))
    return model


def loaded_as(model: Model, dtype: torch.dtype, folder: Path) -> Model:
    """The model saved to a folder and loaded from it in another dtype, as a user loads one."""
    family = model.case.family
    model.module.save_pretrained(str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, about defaults
        module = getattr(_modeling(family), family.model_class).from_pretrained(
            str(folder), dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        )
    return attrs.evolve(model, module=module.eval().requires_grad_(False))


def _make_routing_matter(block: nn.Module) -> None:
    """Fill what transformers starts tame or at zero: gates, correction biases, hash tables."""
    for name, tensor in block.state_dict().items():
        if name in ("gate.weight", "router.weight"):
            tensor.normal_(0.0, GATE_SPREAD / math.sqrt(tensor.shape[1]))
        elif name == "router.bias" or name.endswith("_proj_bias"):
            tensor.normal_(0.0, 0.5)
        elif name.endswith("e_score_correction_bias"):
            tensor.normal_(0.0, BIAS_SPREAD)
        elif name.endswith("tid2eid"):
            experts = torch.rand(tensor.shape[0], 16).argsort(dim=1)
            tensor.copy_(experts[:, : tensor.shape[1]])


def prompt_of(batch: int = 2, length: int = 12) -> Tensor:
    """(batch, length) tokens, the same every time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)
