"""Weights on disk: published checkpoints, the trainer's, and our own. Nothing that is read can execute code."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vggt.config import HEADS, VGGTConfig
from vggt.damage import damage, is_archive
from vggt.lora import merge

WEIGHT_FILES = ("model.safetensors", "model.pt")  # of a folder: the first that is there
CONFIG_FILE = "config.json"
CONFIG_KEY = "model_config"  # in a file
ADAPTERS_KEY = "adapters"  # in a file that holds only what was trained: init (where the rest is), fingerprint, scale
FILE_SUFFIXES = (".pt", ".safetensors")
NANO = Path(__file__).with_name("nano")  # the folder of vggt-nano, which comes with the package


def read_checkpoint(source: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Names and tensors, and the model's configuration, or {} if the checkpoint has none.

    source: see VGGT.from_pretrained. A .pt holds the tensors themselves, or {"model": tensors} and, if it is one
    of the trainer's, "model_config". Adapters (model.lora) come merged into what they were trained on, which must still
    be where it was. Raises ValueError saying what is wrong with `source`.
    """
    path = Path(source).expanduser()
    if not path.exists():
        path = _bundled() if str(source) == NANO.name else _download(str(source))
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                config = json.loads((file.metadata() or {}).get(CONFIG_KEY, "{}"))
            if not isinstance(config, dict):
                raise ValueError(f"{CONFIG_KEY} is not an object")
            return load_file(path), config
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path}: not a readable .safetensors file ({error})") from error
    wrong = damage(path) if is_archive(path) else None
    if wrong is not None:
        raise ValueError(f"{path}: not a readable checkpoint: damaged ({wrong}); copy it again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive(path))
    except Exception as error:  # damaged pickles end in errors of many types
        # torch's own words are left out: some advise loading that may execute code.
        what = "truncated, no checkpoint, or more than tensors in it"
        raise ValueError(f"{path}: not a readable checkpoint: {what} ({type(error).__name__})") from error
    state, config = content, {}
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        state, config = content["model"], content.get(CONFIG_KEY, {})
    is_state = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not is_state or not isinstance(config, dict):
        raise ValueError(f"{path}: expected names and tensors, or {{'model': names and tensors}}")
    adapters = content.get(ADAPTERS_KEY)
    return (with_base(path, state, adapters)[0] if isinstance(adapters, dict) else state), config


def with_base(
    path: Path, trained: Mapping[str, Tensor], adapters: Mapping[str, Any], init: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the checkpoint at `path` trained, merged into what it began from, and that. init: where that is now.

    Raises ValueError if that is not there, or another one.
    """
    place = init or str(adapters["init"])
    what = f"{path}: holds adapters, and the heads that were trained with them, to be merged into {place}"
    try:
        base, _ = read_checkpoint(place)
    except ValueError as error:
        raise ValueError(f"{what}, which cannot be read: {error}") from error
    if fingerprint(base) != adapters["fingerprint"]:
        raise ValueError(f"{what}, which is not the checkpoint that it began from")
    return merge(base, trained, adapters["scale"]), base


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Identifies a checkpoint, whatever its path and file format, by its names, types, shapes and CRCs."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        crc = zlib.crc32(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        digest.update(f"{name} {value.dtype} {list(value.shape)} {crc}\n".encode())
    return digest.hexdigest()


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What read_checkpoint returns, of a folder and its config.json."""
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if weights is None:
        raise ValueError(
            f"{folder}: expected {' or '.join(WEIGHT_FILES)} in this folder, found neither; of a run it is "
            "checkpoints/latest"
        )
    state, config = read_checkpoint(weights)
    path = folder / CONFIG_FILE
    if path.exists():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not readable as JSON ({error})") from error
        if not isinstance(config, dict):
            raise ValueError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return state, config


def _bundled() -> Path:
    if not (NANO / WEIGHT_FILES[0]).exists():
        raise ValueError(
            f"nano: expected its weights in {NANO}, where they are not: install from a whole checkout, or make them "
            "with make nano"
        )
    return NANO


def _download(name: str) -> Path:
    looks_local = name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith((".pt", ".safetensors"))
    if looks_local:
        raise ValueError(
            f"{name}: no such file; expected a .pt or .safetensors file, a folder with one, nano, or a name like "
            "facebook/VGGT-1B"
        )
    try:
        from huggingface_hub import snapshot_download  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"{name}: no such file; to fetch it from Hugging Face: pip install -e '.[hub]'") from error
    try:
        folder = Path(snapshot_download(name, allow_patterns=[WEIGHT_FILES[0], CONFIG_FILE]))
    except Exception as error:  # the hub's client raises its own, its HTTP library's and OSError
        raise ValueError(f"{name}: no such file here, and not to be had from Hugging Face ({error})") from error
    if not (folder / WEIGHT_FILES[0]).exists():
        raise ValueError(f"{name}: this repository of Hugging Face has no {WEIGHT_FILES[0]}")
    return folder


def heads_in(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The heads that a state dict has weights of."""
    return tuple(head for head in HEADS if any(name.startswith(f"{head}_head.") for name in state))


def fill(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Give `model` its tensors from `state` by name, each in the type the model has it in.

    Its parameters become new ones, on the CPU: fill before .to() and before making an optimizer. Heads that the model
    was built without may be in `state`. source: what `state` was read from, for messages. Raises
    ValueError listing what is missing, unexpected, of another shape or not finite; the model is then unchanged.
    """
    own = model.state_dict()
    modules, there = ({name.split(".")[0] for name in names} for names in (own, state))
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own and name.split(".")[0] in modules]
    misshapen = [
        f"{name} (file {list(state[name].shape)}, model {list(own[name].shape)})"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
    found = [f"{len(names)} {kind}: {_shorten(names)}" for kind, names in problems if names]
    if found:
        raise ValueError(f"{source} does not fit this model; {'; '.join(found)}{_advice(missing, there)}")
    broken = [name for name in own if not state[name].isfinite().all()]
    if broken:
        raise ValueError(
            f"{source}: {len(broken)} tensors hold NaN or infinite values: {_shorten(broken)}; is it damaged?"
        )
    # Copies: what was read may be mapped from a file that is written over one day.
    copies = {name: state[name].to(value.dtype, copy=True) for name, value in own.items()}
    model.load_state_dict(copies, assign=True)


def load_weights(model: nn.Module, source: str | Path) -> None:
    """Fill `model` from `source`: see read_checkpoint and fill, also for what they raise."""
    fill(model, read_checkpoint(source)[0], source)


def _advice(missing: list[str], there: set[str]) -> str:
    """What to do if whole modules are missing: the checkpoint may be right, and the model have too many heads."""
    absent = sorted({name.split(".")[0] for name in missing} - there)
    return (
        f". It has no {', '.join(absent)} at all: is it of VGGT, and are all of VGGTConfig.heads needed?"
        if absent
        else ""
    )


def _shorten(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _is_ours(folder: Path) -> bool:
    """Whether a folder was written by write_folder. Other models' have a config.json, too, with like names."""
    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        VGGTConfig.from_dict(content)
    except (OSError, ValueError, AttributeError, TypeError):
        return False
    return "heads" in content


def write_folder(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write folder/model.safetensors and folder/config.json, whole or not at all.

    Raises ValueError if the folder is named like a file, OSError if it cannot be written.
    """
    if folder.suffix in FILE_SUFFIXES or folder.is_file():
        raise ValueError(f"{folder}: expected the name of a folder, which gets {WEIGHT_FILES[0]} and {CONFIG_FILE}")
    there = next((name for name in (CONFIG_FILE, *WEIGHT_FILES) if (folder / name).exists()), None)
    if there is not None and not _is_ours(folder):
        raise ValueError(f"{folder / there}: is there, and was not written by this program; give another folder")
    write_file(folder / WEIGHT_FILES[0], state)
    with whole_file(folder / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> None:
    """Write names and tensors to a .safetensors or else a .pt file, whole or not at all. Raises OSError.

    config: stored in the file, if readers could not know it otherwise; a .pt without it holds the plain state
    dict, like the published one.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with whole_file(path) as temporary:
        if path.suffix == ".safetensors":
            temporary.touch()
            mode = temporary.stat().st_mode
            metadata = None if config is None else {CONFIG_KEY: json.dumps(dict(config))}
            save_file(tensors, temporary, metadata)  # for its owner alone, whatever the umask
            temporary.chmod(mode)
        else:
            torch.save(tensors if config is None else {"model": tensors, CONFIG_KEY: dict(config)}, temporary)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to; what is written there is then on disk as `path`, or gone after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid4().hex[:8]}.tmp")  # another process may be writing the same file
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # each library reports a full disk in its own way
        reason = str(error).partition("\n")[0]
        raise OSError(f"{path}: cannot be written, is the disk full? ({reason})") from error
    finally:
        temporary.unlink(missing_ok=True)
