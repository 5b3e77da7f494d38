"""YAML files, read with errors that name them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Rejects repeated keys: YAML would silently keep only the last of two `data:` sections.

    Numbers are decimal: YAML 1.1 reads 010 as 8, 1:30 as 90, and 5e-5 as a word.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, times in names.items():
            if times > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is given {times} times", node.start_mark)
        return super().construct_mapping(node, deep)


INT, FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
NUMBERS = {
    INT: r"[-+]?[0-9]+$",
    FLOAT: r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|[-+]?\.inf$|\.nan$",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in NUMBERS]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for tag, number in NUMBERS.items():
    _Loader.add_implicit_resolver(tag, re.compile(number), list("-+.0123456789"))
_Loader.add_constructor(INT, lambda _, node: int(node.value))


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would take for a number."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def dump_yaml(values: Any) -> str:
    """What parse_yaml reads back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str) -> Any:
    """Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The keys and values of a file. Raises ValueError that begins with `what` if it is missing or not readable."""
    try:
        loaded = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{what}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{what}: not readable as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(loaded, dict | None):
        raise ValueError(f"{what}: expected keys and values, found {type(loaded).__name__}")
    return loaded or {}
