"""Reading weights: published checkpoints, and the trainer's own. Nothing that is read can execute code."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

HUB_FILE = "model.safetensors"


def read_state_dict(source: str) -> dict[str, Tensor]:
    """Name -> tensor from a .pt or .safetensors file, or from a Hugging Face name such as facebook/VGGT-1B.

    A .pt holds the tensors themselves or {"model": tensors}. Raises ValueError saying what is wrong with `source`.
    """
    path = Path(source)
    if not path.exists():
        path = _download(source)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable .safetensors file ({error})") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable checkpoint of tensors only ({first_line})") from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: expected names and tensors, or {{'model': names and tensors}}")
    return state


def _download(name: str) -> Path:
    looks_local = name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith((".pt", ".safetensors"))
    if looks_local:
        raise ValueError(f"{name}: no such file; expected a .pt or .safetensors file or a name like facebook/VGGT-1B")
    try:
        from huggingface_hub import hf_hub_download  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"{name}: no such file; to fetch it from Hugging Face: pip install '.[hub]'") from error
    try:
        return Path(hf_hub_download(name, HUB_FILE))
    except Exception as error:  # the hub's client raises its own, its HTTP library's and OSError
        raise ValueError(f"{name}: no such file here, and not to be had from Hugging Face ({error})") from error


def load_weights(model: nn.Module, source: str) -> None:
    """Fill `model` from `source` by name; heads that the model was built without may be in the file.

    Raises ValueError listing what is missing, unexpected or of another shape; the model is then unchanged.
    """
    state = read_state_dict(source)
    own = model.state_dict()
    modules = {name.split(".")[0] for name in own}
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
        raise ValueError(f"{source} does not fit this model; {'; '.join(found)}")
    model.load_state_dict({name: state[name] for name in own})


def _shorten(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
