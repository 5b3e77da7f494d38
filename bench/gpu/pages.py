"""What was found on a GPU, as a file for programs and a page for people."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from shards.writer import atomic_file, write_json


def write_pages(out: Path, found: dict[str, Any]) -> None:
    """out/<name of the GPU>.json and .md."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", found["gpu"]).strip("-")
    write_json(out / f"{name}.json", found)
    with atomic_file(out / f"{name}.md") as file:
        file.write(page(found).encode())


def page(found: dict[str, Any]) -> str:
    facts = ", ".join(f"{key} {cell(value)}" for key, value in found.items() if key not in ("gpu", "stages"))
    parts = [f"# {found['gpu']}\n\nFound by `make gpu-check`: {facts}.\n"]
    for name, result in found["stages"].items():
        parts.append(f"## {result['title']}\n\nStage `{name}`: {result['state']}, {result.get('seconds', 0)} s.\n")
        parts += [table(result["rows"])] * bool(result["rows"])
        parts += ["```\n" + "\n".join(result["said"]) + "\n```\n"] if "said" in result else []
    return "\n".join(parts)


def table(rows: list[dict[str, Any]]) -> str:
    """A column for each key that a row has."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[key.replace("_", " ") for key in keys], ["---"] * len(keys)]
    lines += [[cell(row.get(key)) for key in keys] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
