"""The settings of a run: those of each module, composed. Their defaults are the published recipe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shards.writer import atomic_file, set_aside
from train.data.plan import DataConfig
from train.engine.checkpoint import CheckpointConfig
from train.engine.optim import OptimConfig
from train.engine.parallel import Strategy
from train.evaluation.guard import Guard
from train.evaluation.metrics import METRICS
from train.objective.losses import OBJECTIVE, LossConfig
from train.runtime.precision import Precision
from train.runtime.typed import Location, build, closest, documented
from train.runtime.yaml_files import dump_yaml, read_yaml
from vggt.config import PRESETS


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """names: patterns of frozen linear layers; rank of what they learn, which counts alpha / rank times."""

    names: tuple[str, ...]
    rank: int = 16
    alpha: float = 16.0

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("names: expected patterns of linear layers, found none")
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank: expected at least 1, found {self.rank}; alpha: more than 0, found {self.alpha}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    preset: str = documented("1b", "size of the model: 1b (published), nano, demo or tiny")
    freeze: tuple[str, ...] = documented(("*aggregator*",), "parameters that do not train, as patterns of their names")
    lora: LoraConfig | None = documented(
        None, 'adapters for frozen linear layers: {names: ["*aggregator*attn.qkv"], rank: 16, alpha: 16}; null: none'
    )
    head_chunk: int | None = documented(
        1, "frames that go through a dense head at a time: fewer need less memory; null: all"
    )
    recompute: bool = documented(
        True, "whether blocks that train run again in the backward pass: far less memory, up to half more computing"
    )
    aggregator_dtype: Literal["fp32", "bf16"] = documented(
        "fp32", "bf16 halves the memory of a frozen aggregator's linear weights; results stay the same"
    )

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, found {self.preset!r}")
        if self.head_chunk is not None and self.head_chunk < 1:
            raise ValueError(f"head_chunk: expected at least 1 frame, or null for all, found {self.head_chunk}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    init: Location | None = documented(
        None,
        "weights to start from: a .pt or .safetensors file, a folder or a hub name (facebook/VGGT-1B); null: none",
    )
    out_dir: Location = documented(
        "runs/finetune", "folder for everything the run writes; a run that is already there is resumed"
    )
    seed: int = documented(0, "of the order of the data, the random draws and new weights")
    epochs: int = documented(20, "number of epochs")
    steps_per_epoch: int = documented(800, "steps; an epoch is a unit of measure, not a pass over the data")
    max_steps: int | None = documented(None, "total steps, in place of epochs * steps_per_epoch; null: use those")
    max_img_per_gpu: int = documented(48, "images per step and GPU; a scene of n views takes n of them")
    accum_steps: int = documented(
        2, "chunks that a batch is computed in: more chunks need less memory and take slightly longer"
    )
    strategy: Strategy = documented(
        "ddp", "how ranks share the model: ddp (each holds a copy) or fsdp (each holds a part of every tensor)"
    )
    precision: Precision = documented("bf16", "of the aggregator: bf16 or fp32; heads and losses always use fp32")
    tf32: bool = documented(True, "whether GPUs round the inputs of fp32 matrix products to 10 bits of mantissa")
    compile: bool = documented(
        False, "whether to compile the transformer blocks with torch.compile; the first steps then take minutes"
    )
    val_every: int = documented(
        800, "steps between validations; there is also one before the first step and one after the last"
    )
    val_at: tuple[int, ...] = documented((50, 200), "steps of further validations: harm shows early")
    guard: Guard = documented(
        "warn",
        "if a validation is worse than the first beyond the noise: warn, stop (if one metric is, twice in a row), off",
    )
    log_every: int = documented(10, "steps that a log line averages over")
    profile_steps: int = documented(
        0, "steps to say of where their time goes, and then a trace, in out_dir/profile; 0: none"
    )
    max_skipped: int = documented(
        20, "steps in a row that may be skipped because a loss or gradient is not finite; then the run stops"
    )
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
        for name in ("seed", "max_skipped", "profile_steps"):
            if not 0 <= getattr(self, name) < 2**63:  # torch takes no larger seed
                raise ValueError(f"{name}: expected at least 0, and less than 2^63, found {getattr(self, name)}")
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
        if self.model.lora is not None and self.init is None:
            raise ValueError("model.lora: corrects weights that are there already; give init=... (a checkpoint)")
        if self.model.lora is not None and self.loss.match > 0:
            raise ValueError("loss.match: is for whole models from scratch, and model.lora for adapters; leave one out")
        if self.strategy == "fsdp" and (self.optim.muon_lr is not None or self.loss.match > 0):
            raise ValueError(
                "strategy: fsdp holds parts of matrices, but optim.muon_lr and loss.match need them whole; use ddp"
            )
        self._check_best()
        if self.model.aggregator_dtype == "bf16" and self.precision != "bf16":
            raise ValueError(f"model.aggregator_dtype: bf16 needs precision=bf16, found {self.precision}")

    def _check_best(self) -> None:
        best = self.checkpoint.best
        if not best:
            raise ValueError("checkpoint.best: expected a metric, or some, found none")
        for name in (best,) if isinstance(best, str) else best:
            self._check_metric(name)

    def _check_metric(self, name: str) -> None:
        if name == OBJECTIVE:
            return
        if name not in METRICS:
            raise ValueError(f"checkpoint.best: no metric is called {name!r}{closest(name, [OBJECTIVE, *METRICS])}")
        missing = set(METRICS[name].heads) - set(self.loss.heads)
        if missing:
            raise ValueError(f"checkpoint.best: {name} needs the head(s) {', '.join(sorted(missing))}; see loss")

    @property
    def total_steps(self) -> int:
        return self.max_steps or self.epochs * self.steps_per_epoch


CONFIG_FILE = "config.yaml"  # of a run


def write_config(out_dir: Path, config: TrainConfig, *, keep_other: bool) -> bool:
    """Write a run's configuration to its folder; returns whether another one was there and was set aside."""
    path, content = out_dir / CONFIG_FILE, dump_yaml(to_dict(config)).encode()
    kept = keep_other and path.is_file() and path.read_bytes() != content and set_aside(path)
    with atomic_file(path) as file:
        file.write(content)
    return kept


def read_config(out_dir: Path) -> dict[str, Any]:
    """What write_config left, as YAML's types. Raises ValueError for a file that is missing or damaged."""
    path = out_dir / CONFIG_FILE
    values = read_yaml(path, str(path))
    sections = [name for name in ("data", "checkpoint") if not isinstance(values.get(name), dict)]  # one is the last
    if sections:
        raise ValueError(f"{path}: empty or cut off, it has no section {' nor '.join(sections)}; put a whole one there")
    return values


def data_config(values: dict[str, Any], where: str) -> DataConfig:
    """A data section as YAML's types. Raises ValueError that says where it is wrong."""
    try:
        return build(DataConfig, values, "data.")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as YAML's types."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))
