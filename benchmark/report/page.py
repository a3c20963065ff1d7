"""What all reports have: a title, what was run, tables, and how it was measured."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmark.report.tables import Table


def listed(described: Mapping[str, Any]) -> str:
    """``name value, name value``."""
    return ", ".join(f"{name} {value}" for name, value in described.items())


def bullets(lines: Iterable[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


def section(table: Table) -> str:
    return f"## {table.title}\n\n{table.markdown()}"


def page(
    document: Mapping[str, Any], title: str, tables: Sequence[Table], notes: Sequence[str]
) -> str:
    """The report of a study as markdown."""
    settings = document["settings"]
    guidance, dtype = settings.get("guidance_scale"), settings.get("dtype", "")
    run = [
        f"Model `{settings['model']}`",
        f"{len(document['prompts'])} prompts of the {settings['split']} split",
        f"{settings['num_inference_steps'][0]} steps",
        *([] if guidance is None else [f"guidance {guidance:g}"]),
        *([dtype] if isinstance(dtype, str) and dtype else []),
    ]
    parts = [f"# {title}\n", f"{', '.join(run)}.\n", *map(section, tables)]
    notes = [*notes, f"Environment: {listed(document['environment'])}."]
    return "\n".join([*parts, "## How it was measured\n", bullets(notes)])
