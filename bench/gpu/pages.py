"""What was found on a GPU, as a file for programs and a page for people."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from shards.writer import atomic_file, write_json

GOOD = "All stages are done, and nothing is wrong."
PRETENDED = "a CPU that pretends"


def verdict(found: dict[str, Any]) -> str:
    """A line: what is wrong, and what is not complete."""
    stages = found["stages"]
    bad = [row["what"] for result in stages.values() for row in result["rows"] if row.get("good") is False]
    short = [f"{name} ({result['state']})" for name, result in stages.items() if result["state"] != "done"]
    parts = [f"Not good: {'; '.join(bad)}."] * bool(bad) + [f"Not complete: {', '.join(short)}."] * bool(short)
    return " ".join(parts) or GOOD


def write_pages(out: Path, found: dict[str, Any]) -> Path:
    """out/<name of the GPU>.json and .md, which is returned."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", found["gpu"]).strip("-")
    write_json(out / f"{name}.json", found)
    with atomic_file(out / f"{name}.md") as file:
        file.write(page(found).encode())
    return out / f"{name}.md"


def page(found: dict[str, Any]) -> str:
    facts = ", ".join(f"{key} {cell(value)}" for key, value in found.items() if key not in ("gpu", "stages"))
    by = "`make gpu-check` ([GPU.md](../GPU.md))"
    if found["gpu"] == PRETENDED:
        by = (
            "`check.py --pretend`: every stage was tried on a CPU, of the smallest model. No figure here means anything"
        )
    parts = [f"# {found['gpu']}\n\n{verdict(found)}\n\nFound by {by}: {facts}.\n"]
    for name, result in found["stages"].items():
        state = f"{result['state']}, {result['seconds']} s" if "seconds" in result else result["state"]
        parts.append(f"## {result['title']}\n\nStage `{name}`: {state}. {result['says']}\n")
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
