"""The configuration of a run: frozen dataclasses, filled from defaults < YAML < key=value, checked on the way.

Each module owns the dataclass that configures it; TrainConfig is those, composed. Its defaults are the published
recipe, which train/configs/default.yaml spells out.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from shards.writer import atomic_file, set_aside
from train.checkpoint import CheckpointConfig
from train.losses import OBJECTIVE, LossConfig
from train.metrics import FIGURES
from train.optim import OptimConfig
from train.parallel import Strategy
from train.plan import DataConfig, Location
from vggt.config import PRESETS

Precision = Literal["bf16", "fp32"]
CONFIG_FILE = "config.yaml"  # of a run


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    preset: str = "1b"
    freeze: tuple[str, ...] = ("*aggregator*",)
    head_chunk: int | None = 1
    aggregator_dtype: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, found {self.preset!r}")
        if self.head_chunk is not None and self.head_chunk < 1:
            raise ValueError(f"head_chunk: expected at least 1 frame, or null for all, found {self.head_chunk}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    init: Location | None = None
    out_dir: Location = "runs/finetune"
    seed: int = 0
    epochs: int = 20
    steps_per_epoch: int = 800
    max_steps: int | None = None
    max_img_per_gpu: int = 48
    accum_steps: int = 2
    strategy: Strategy = "ddp"
    precision: Precision = "bf16"
    tf32: bool = True
    compile: bool = False
    val_every: int = 800
    log_every: int = 10
    max_skipped: int = 20
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if not self.out_dir:
            raise ValueError("out_dir: expected a folder, found nothing")
        for name in ("epochs", "steps_per_epoch", "max_img_per_gpu", "accum_steps", "val_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if not 0 <= self.seed < 2**63 or self.max_skipped < 0:  # torch takes no more
            raise ValueError("seed and max_skipped: expected at least 0, and the seed less than 2^63")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps: expected at least 1, or null for epochs, found {self.max_steps}")
        if self.max_img_per_gpu < self.data.views[1]:
            raise ValueError(
                f"max_img_per_gpu: {self.max_img_per_gpu} is less than the {self.data.views[1]} views that "
                "data.views allows a scene; raise it or lower data.views"
            )
        if self.model.freeze and self.init is None:
            raise ValueError(
                f"init: not given, but model.freeze={list(self.model.freeze)} keeps weights as they are, and random "
                "ones teach nobody anything; give init=... (a checkpoint), or model.freeze=[]"
            )
        self._check_best()
        if self.model.aggregator_dtype == "bf16" and self.precision != "bf16":
            raise ValueError(f"model.aggregator_dtype: bf16 needs precision=bf16, found {self.precision}")

    def _check_best(self) -> None:
        name = self.checkpoint.best
        if name == OBJECTIVE:
            return
        if name not in FIGURES:
            near = difflib.get_close_matches(name, [OBJECTIVE, *FIGURES], n=1, cutoff=0.0)[0]
            raise ValueError(f"checkpoint.best: no figure is called {name!r}; the nearest is {near}")
        missing = set(FIGURES[name].heads) - set(self.loss.heads)
        if missing:
            raise ValueError(f"checkpoint.best: {name} needs the head(s) {', '.join(sorted(missing))}; see loss")

    @property
    def total_steps(self) -> int:
        return self.max_steps or self.epochs * self.steps_per_epoch


def load_config(file: str | Path | None, overrides: list[str]) -> TrainConfig:
    """The configuration of `file` (YAML; None: the defaults) with key=value overrides such as data.shards=DIR.

    Raises ValueError naming the key, what was expected and what was found, with the nearest name for unknown keys.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values = _read_yaml(user_path(str(file)), f"--config {file}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"{override!r}: expected key=value, such as seed=1 or data.shards=data/shards")
        *parents, leaf = key.split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(f"{key}: {parent} is a value, not a section")
        target[leaf] = _Typed(text)
    return _build(TrainConfig, values, "")


def _read_yaml(path: Path, what: str) -> dict[str, Any]:
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise ValueError(f"{what}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{what}: not readable as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(loaded, dict | None):
        raise ValueError(f"{what}: expected keys and values, found {type(loaded).__name__}")
    return loaded or {}


class _UniqueKeys(yaml.SafeLoader):
    """Of equal keys YAML drops all but the last, without a word: a second `data:` the whole first one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, times in names.items():
            if times > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is given {times} times", node.start_mark)
        return super().construct_mapping(node, deep)


def user_path(text: str) -> Path:
    """A path from the command line, with ~ for the home folder also where the shell leaves it, as in --out=~/x."""
    return Path(text).expanduser()


def write_config(out_dir: Path, config: TrainConfig, *, keep_other: bool) -> bool:
    """Leave the configuration of a run in its folder; whether another one was there, and was kept under a number."""
    path, content = out_dir / CONFIG_FILE, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True).encode()
    kept = keep_other and path.is_file() and path.read_bytes() != content and set_aside(path)
    with atomic_file(path) as file:
        file.write(content)
    return kept


def read_config(out_dir: Path) -> dict[str, Any]:
    """What write_config left, as YAML's types. Raises ValueError for a file that is missing or damaged."""
    path = out_dir / CONFIG_FILE
    values = _read_yaml(path, str(path))
    sections = [name for name in ("data", "checkpoint") if not isinstance(values.get(name), dict)]  # one is the last
    if sections:
        raise ValueError(f"{path}: empty or cut off, it has no section {' nor '.join(sections)}; put a whole one there")
    return values


def data_config(values: dict[str, Any], where: str) -> DataConfig:
    """A data section as YAML's types. Raises ValueError that says where it is wrong."""
    try:
        return _build(DataConfig, values, "data.")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


class _Typed(str):
    """The text that was given for a key on the command line; how it is read depends on the key's type."""


def _read_typed(kinds: tuple[Any, ...], text: str, name: str) -> Any:
    """Text stays as it is where text is expected; anything else is read as YAML."""
    if text in ("", "null") and types.NoneType in kinds:
        return None
    takes_text = any(kind is str or get_origin(kind) is Annotated for kind in kinds)
    takes_list = any(get_origin(kind) is tuple for kind in kinds)
    if takes_text and not (takes_list and text.startswith("[")):
        return str(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: {text!r} is not readable as a YAML value") from error


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as YAML's types."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data": {"width": 518}} -> {"data.width": 518}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    types_of = get_type_hints(cls, include_extras=True)
    names = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in names:
            raise ValueError(f"{prefix}{key}: no such key; the nearest is {_nearest(prefix, key, values[key], names)}")
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory]  # neither: both are MISSING
    for key in required:
        if key not in values:
            raise ValueError(f"{prefix}{key}: not given")
    arguments = {key: _convert(types_of[key], value, f"{prefix}{key}") for key, value in values.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def _nearest(prefix: str, key: str, value: Any, names: set[str]) -> str:
    """The key that was probably meant: of the same last name in another section, or else like it in this one."""
    wanted = {name.rpartition(".")[2] for name in flatten({key: value})}
    elsewhere = [name for name in flatten(to_dict(TrainConfig(init="any"))) if name.rpartition(".")[2] in wanted]
    return elsewhere[0] if elsewhere else prefix + difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)[0]


def _convert(kind: Any, value: Any, name: str) -> Any:
    """`value` as YAML or the command line gave it, as the type `kind`. Raises ValueError naming the key."""
    if isinstance(value, _Typed):
        kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
        value = _read_typed(kinds, value, name)
    if get_origin(kind) is Annotated:  # plan.Location
        return os.path.expanduser(_convert(get_args(kind)[0], value, name))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{name}: expected a section of keys, found {value!r}")
        return _build(kind, value, f"{name}.")  # pyright: ignore[reportArgumentType]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        given = list if isinstance(value, list) else dict if isinstance(value, dict) else None
        kinds = [a for a in arguments if a is not type(None)]
        fits = [a for a in kinds if (get_origin(a) is tuple) == (given is list)]
        return _convert((fits or kinds)[0], value, name)
    if origin is Literal:
        if value not in arguments:
            near = difflib.get_close_matches(str(value), [str(a) for a in arguments], n=1, cutoff=0.0)[0]
            choices = ", ".join(map(str, arguments))
            raise ValueError(f"{name}: expected one of {choices}, found {value!r}; the nearest is {near}")
        return value
    if origin is tuple:
        if not isinstance(value, list) or (arguments[-1] is not Ellipsis and len(value) != len(arguments)):
            length = "" if arguments[-1] is Ellipsis else f" of {len(arguments)}"
            raise ValueError(f"{name}: expected a list{length} such as [{arguments[0].__name__}, ...], found {value!r}")
        return tuple(_convert(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)  # also of text: YAML 1.1 takes 5e-5 for a word
        except OverflowError:
            number = math.inf
        except ValueError as error:
            raise ValueError(f"{name}: expected float, found {value!r}") from error
        if not math.isfinite(number):
            raise ValueError(f"{name}: expected a finite number, found {value!r}")
        return number
    if type(value) is not kind:
        raise ValueError(f"{name}: expected {kind.__name__}, found {value!r} ({type(value).__name__})")
    return value
