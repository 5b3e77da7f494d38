"""The configuration of a run, from defaults < YAML file < key=value on the command line.

Each module owns the dataclass that configures it; train.engine.settings composes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from train.engine.settings import TrainConfig
from train.runtime.typed import CommandLineText, build, options
from train.runtime.yaml_files import read_yaml


def load_config(file: str | Path | None, overrides: list[str]) -> TrainConfig:
    """The configuration of `file` (YAML; None: the defaults) with key=value overrides such as data.shards=DIR.

    Raises ValueError naming the key, what was expected and what was found.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values = read_yaml(user_path(str(file)), f"--config {file}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(
                f"{override!r}: expected key=value, such as seed=1 or data.shards=data/shards; a value "
                "with spaces or quotes goes between quotes of its own (with make ARGS=\"'key=[a, b]'\")"
            )
        *parents, leaf = key.split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(f"{key}: {parent} is a value, not a section")
        target[leaf] = CommandLineText(text)
    return build(TrainConfig, values)


def list_keys() -> str:
    """Every key with its default and one line about it."""
    lines = ["keys, with their defaults:"]
    for key, default, text in options(TrainConfig):
        plain = list(default) if isinstance(default, tuple) else default
        shown = yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
        lines.append(f"  {f'{key}={shown}':<34}  {text}")
    return "\n".join(lines)


def user_path(text: str) -> Path:
    """A path from the command line, with ~ for the home folder also where the shell leaves it, as in --out=~/x."""
    return Path(text).expanduser()
