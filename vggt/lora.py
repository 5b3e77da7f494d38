"""Low-rank adaptation (LoRA, arXiv:2106.09685): frozen linear layers learn corrections of a small rank."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch

import torch.nn.functional as F
from torch import Tensor, nn

DOWN, UP = "lora_down", "lora_up"  # beside `weight` and `bias`: what the paper calls A and B


class LoraLinear(nn.Linear):
    """A linear layer plus scale * up(down(x)): down [rank, in], up [out, rank]; made by add_lora."""

    lora_down: nn.Parameter
    lora_up: nn.Parameter
    lora_scale: float

    def begin(self, rank: int, scale: float) -> None:
        """Corrections that are zero, beside a weight that keeps its type."""
        down = self.weight.new_empty(rank, self.in_features).float()
        self.lora_down = nn.Parameter(nn.init.kaiming_uniform_(down, a=5**0.5))
        self.lora_up = nn.Parameter(down.new_zeros(self.out_features, rank))
        self.lora_scale = scale

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002, as torch calls it
        """[..., in] -> [..., out]."""
        return super().forward(input) + F.linear(F.linear(input, self.lora_down) * self.lora_scale, self.lora_up)


def add_lora(model: nn.Module, patterns: tuple[str, ...], rank: int, alpha: float) -> None:
    """Turn the frozen linear layers whose names match a pattern into LoraLinear, in place.

    `up` is zero, so that the model is at first what it was, to the bit; `down` is random. The correction counts
    alpha / rank times. Weights keep their type, which may be bf16; what is added is float32 and trains. Raises
    ValueError for a pattern that matches no linear layer or one that trains, and a rank that is none of the layer's.
    """
    chosen: dict[str, nn.Linear] = {}
    for pattern in patterns:
        found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and fnmatch(n, pattern)}
        if not found:
            raise ValueError(f"names: {pattern!r} matches no linear layer; some are {', '.join(_examples(model))}")
        chosen |= found
    for name, layer in chosen.items():
        if layer.weight.requires_grad:
            raise ValueError(f"names: {name} trains itself; add it to model.freeze, or leave it out")
        widest = min(layer.weight.shape)
        if not 1 <= rank <= widest:
            raise ValueError(f"rank: expected 1 to {widest}, the width of {name}, found {rank}")
    for layer in chosen.values():
        layer.__class__ = LoraLinear  # still the same object, which others may hold
        assert isinstance(layer, LoraLinear)
        layer.begin(rank, alpha / rank)


def merge(base: Mapping[str, Tensor], trained: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """`base` with what was trained on it: tensors of its names replace its own, corrections are added to the weights.

    What was trained is as it was trained, and the sums are float32: in a half-precision type of `base` small
    corrections are lost. The rest is in the types of `base`. Raises ValueError for what does not belong to it.
    """
    downs = {name.removesuffix(DOWN) + "weight": name for name in trained if name.endswith(DOWN)}
    whole = [name for name in trained if not name.endswith((DOWN, UP))]
    shapes = {name: trained[name].shape for name in whole}
    shapes |= {
        name: (trained[down.removesuffix(DOWN) + UP].shape[0], trained[down].shape[1]) for name, down in downs.items()
    }
    for name, shape in shapes.items():
        if name not in base or base[name].shape != shape:
            raise ValueError(f"{name} is not there, or has another shape")
    merged = {**base} | {name: trained[name] for name in whole}
    for name, down in downs.items():
        correction = scale * trained[down.removesuffix(DOWN) + UP].float() @ trained[down].float()
        merged[name] = base[name].float() + correction
    return merged


def _examples(model: nn.Module) -> list[str]:
    """The names of some linear layers, of different kinds."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kinds = {name.rpartition(".")[2]: name for name in names}
    return [*kinds.values()][:4]
