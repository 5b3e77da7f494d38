"""Make one whole checkpoint of what a run trained and of what it started from.

    python -m train.export runs/finetune/checkpoints/latest --out vggt-mine.pt

The tensors that the run trained replace those of its `init`, and adapters (model.lora) are added to the weights that
they correct; all others, the heads it did not build included, stay as they are there, to the byte. Names and shapes are
those of `init`: where it loads, the result does. What was trained is float32, whatever `init` has: rounding to a
smaller type can take back most of a cautious fine-tuning.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.config import user_path
from train.engine.checkpoint import load
from train.engine.optim import freeze
from train.engine.settings import CONFIG_FILE
from vggt import VGGT, VGGTConfig
from vggt.config import PUBLISHED, RUNTIME, preset_of
from vggt.damage import damage
from vggt.lora import UP
from vggt.weights import (
    ADAPTERS_KEY,
    FILE_SUFFIXES,
    WEIGHT_FILES,
    fingerprint,
    heads_in,
    read_checkpoint,
    with_base,
    write_file,
    write_folder,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=user_path, help="of the trainer: OUT/checkpoints/latest or step-*.pt")
    parser.add_argument("--init", help="what the run started from, if it is no longer where the run read it")
    parser.add_argument(
        "--out", type=user_path, required=True, help=".pt, .safetensors, or a folder for both it and a config"
    )
    parser.add_argument("--half", action="store_true", help="write float16: half the size; says what is lost by it")
    arguments = parser.parse_args()
    lost = None
    try:
        state, config, trained, base = export(arguments.checkpoint, arguments.out, arguments.init)
        if arguments.half:
            exact, state = state, {name: value.half() for name, value in state.items()}
            lost = None if base is None else rounded_away(exact, state, base)
        write(arguments.out, state, config)
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)  # as shells expect it of a Ctrl-C
    print(f"{arguments.out}: {len(state):,} tensors, {trained:,} of them trained")
    if lost is not None:
        print(f"Rounding to float16 took back {100 * lost:.2g}% of what training changed (in norm)")


def rounded_away(exact: Mapping[str, Tensor], rounded: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> float:
    """The norm of what rounding changed over the norm of what training did, of the tensors that were trained."""
    trained = [name for name, value in exact.items() if not torch.equal(value.float(), base[name].float())]
    sizes = [sum((exact[n].float() - other[n].float()).square().sum() for n in trained) for other in (rounded, base)]
    return float((sizes[0] / sizes[1]) ** 0.5) if trained else 0.0


def export(
    checkpoint: Path, out: Path, init: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any], int, dict[str, Tensor] | None]:
    """The tensors to write; the model's configuration; the number of trained tensors; those of `init`, if there is one.

    out: the target, which must not be one of the inputs. init: overrides that of the run's configuration. A run from
    scratch has none, and is written whole. Raises ValueError if the run did not start from `init`.
    """
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint}: no such file; expected a checkpoint of the trainer, OUT/checkpoints/latest")
    damaged = damage(checkpoint)
    if damaged is not None:
        raise ValueError(f"{checkpoint}: damaged ({damaged}); take the one before")
    saved = load(checkpoint)
    missing = {"model", "model_config", "config"} - set(saved)
    if missing:
        raise ValueError(f"{checkpoint}: not a checkpoint of the trainer, it has no {', '.join(sorted(missing))}")
    if init is not None and saved["config"]["init"] is None:
        raise ValueError(f"--init: {checkpoint} is of a run from scratch, which started from nothing")
    adapters, given = saved.get(ADAPTERS_KEY), init
    config, init = saved["model_config"] | RUNTIME, init or (adapters or saved["config"])["init"]
    if out.suffix and out.suffix not in FILE_SUFFIXES and not out.is_dir():
        raise ValueError(
            f"{out}: expected a name that ends in {' or '.join(FILE_SUFFIXES)}, or one of a folder, without a dot"
        )
    read = [path for path in (checkpoint, init) if path is not None and Path(path).expanduser().exists()]
    places = [place for path in read for place in weight_places(Path(path).expanduser())]
    if any(place.samefile(target) for place in places for target in weight_places(out)):
        raise ValueError(f"{out}: is what is to be exported; give another --out")
    folder = out.absolute().parent.resolve()
    if folder.name == "checkpoints" and (folder.parent / CONFIG_FILE).exists():
        raise ValueError(f"{out}: is among the checkpoints of a run, which is resumed from them; give another --out")
    if adapters is not None:
        try:
            state, base = with_base(checkpoint, saved["model"], adapters, given)
        except ValueError as error:
            raise ValueError(f"{error}; give the one that it began from as --init") from error
        heads, trained = list(heads_in(state)), sum(not name.endswith(UP) for name in saved["model"])
        return state, config | {"heads": heads}, trained, base
    names = trained_names(config, saved["config"]["model"]["freeze"])
    if init is None:
        return saved["model"], config, len(names), None
    try:
        base, _ = read_checkpoint(init)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}: what the run started from; give --init if it now lies elsewhere") from error
    for name in names:
        if name not in base or base[name].shape != saved["model"][name].shape:
            raise ValueError(f"{init}: {name} is not there, or has another shape: {checkpoint} did not start from it")
    for name, value in saved["model"].items():
        # Held in bf16, they are rounded, and stay so if the run goes on in float32.
        if name not in names and not (name in base and _are_equal(base[name], value)):
            raise ValueError(f"{init}: {name} is frozen, but has other values: {checkpoint} did not start from it")
    if saved.get("init_fingerprint") is not None and saved["init_fingerprint"] != fingerprint(base):
        raise ValueError(f"{init}: is not the checkpoint that {checkpoint} started from; give that one as --init")
    state = {name: saved["model"][name] if name in names else value for name, value in base.items()}
    return state, config | {"heads": list(heads_in(base))}, len(names), base


def _are_equal(base: Tensor, value: Tensor) -> bool:
    return any(torch.equal(base.to(kind).to(value.dtype), value) for kind in (value.dtype, torch.bfloat16))


def weight_places(path: Path) -> list[Path]:
    """The existing paths that name a checkpoint: a file, or a folder and the weights in it."""
    return [place for place in (path, *(path / name for name in WEIGHT_FILES)) if place.exists()]


def write(out: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    """To a file or, with a config.json, to a folder."""
    if out.suffix not in FILE_SUFFIXES:
        write_folder(out, state, config)
        return
    write_file(out, state, None if preset_of(config) == PUBLISHED else config)  # the published sizes go without saying


def trained_names(model_config: Mapping[str, Any], freeze_patterns: list[str]) -> set[str]:
    """The names of the parameters that a run trained."""
    with torch.device("meta"):
        model = VGGT(VGGTConfig.from_dict(model_config))
    freeze(model, tuple(freeze_patterns))
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


if __name__ == "__main__":
    main()
