"""Adapters (model.lora) in a run: what they are put on, and checkpoints that hold them and the trained heads alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from train.engine.lineage import saved_run
from train.engine.settings import LoraConfig, ModelConfig
from vggt import VGGT
from vggt.lora import add_lora
from vggt.weights import ADAPTERS_KEY, fingerprint


def attach(model: VGGT, config: LoraConfig) -> None:
    """Put adapters on the model, in place. Raises ValueError for names or a rank that do not fit it."""
    try:
        add_lora(model, config.names, config.rank, config.alpha)
    except ValueError as error:
        raise ValueError(f"model.lora.{error}") from error


def refuse_adapters(init: str) -> None:
    """Raises ValueError if `init` is a run's checkpoint that holds adapters only."""
    if ADAPTERS_KEY in (saved_run(init) or {}):
        raise ValueError(
            f"init: {init} holds the adapters of a run, and not the model that they belong to; merge them first: "
            f"python -m train.export {init} --out merged.safetensors"
        )


def checked_fingerprint(state: Mapping[str, Tensor], init: str, expected: str | None) -> str:
    """The fingerprint of `init`. Raises ValueError if another one is expected."""
    found = fingerprint(state)
    if expected not in (None, found):
        raise ValueError(
            f"init: {init} is another checkpoint than the one that this run began from, to which what it trained "
            "belongs; put that one back"
        )
    return found


def adapters_content(config: ModelConfig, init: str | None, init_fingerprint: str | None) -> dict[str, Any]:
    """What a checkpoint says of its adapters; nothing if there are none."""
    if config.lora is None:
        return {}
    place = init if init is None or not Path(init).exists() else str(Path(init).absolute())
    return {ADAPTERS_KEY: {"init": place, "fingerprint": init_fingerprint, "scale": config.lora.scale}}


def saved_weights(model: VGGT, config: ModelConfig) -> dict[str, Tensor]:
    """The weights that a checkpoint holds: all, or with adapters those that train."""
    state = model.state_dict()
    if config.lora is None:
        return state
    return {name: state[name] for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_weights(model: VGGT, config: ModelConfig, saved: Mapping[str, Tensor]) -> None:
    """The opposite of saved_weights."""
    model.load_state_dict(saved, strict=config.lora is None)
