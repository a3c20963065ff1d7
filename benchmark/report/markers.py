"""Tables that docs/results.md takes from results, between markers in it."""

from pathlib import Path

from benchmark.errors import BenchmarkError
from benchmark.run.store import write_text
from benchmark.settings import ROOT

PAGE = ROOT / "docs" / "results.md"
END = "<!-- end -->"


def put_between(page: Path, name: str, content: str) -> None:
    """Put ``content`` between ``<!-- NAME -->`` and the next ``<!-- end -->`` of a page.

    Raises:
        BenchmarkError: the markers are not there, or the first one not once.
    """
    begin, text = f"<!-- {name} -->", page.read_text("utf-8")
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(END)
    if text.count(begin) != 1 or not found:
        raise BenchmarkError(f"--update_results: {page} must have {begin} once, and {END} after it")
    write_text(page, f"{before}{begin}\n\n{content}\n{END}{after}")
