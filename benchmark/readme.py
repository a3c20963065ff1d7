"""Tables that README takes from results, between markers in it."""

from pathlib import Path

from benchmark.errors import BenchmarkError
from benchmark.store import write_text

END = "<!-- end -->"


def put_between(readme: Path, name: str, content: str) -> None:
    """Put ``content`` between ``<!-- NAME -->`` and the next ``<!-- end -->`` of a README.

    Raises:
        BenchmarkError: the markers are not there, or the first one not once.
    """
    begin, text = f"<!-- {name} -->", readme.read_text("utf-8")
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(END)
    if text.count(begin) != 1 or not found:
        raise BenchmarkError(
            f"--update_readme: {readme} must have {begin} once, and {END} after it"
        )
    write_text(readme, f"{before}{begin}\n\n{content}\n{END}{after}")
