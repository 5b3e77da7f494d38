"""YAML files, read with errors that name them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml


class _UniqueKeys(yaml.SafeLoader):
    """Rejects repeated keys: YAML would silently keep only the last of two `data:` sections."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, times in names.items():
            if times > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is given {times} times", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The keys and values of a file. Raises ValueError that begins with `what` if it is missing or not readable."""
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise ValueError(f"{what}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{what}: not readable as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(loaded, dict | None):
        raise ValueError(f"{what}: expected keys and values, found {type(loaded).__name__}")
    return loaded or {}
