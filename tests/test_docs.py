"""README.md, docs/ and the benchmark's pages: links lead somewhere, and code runs."""

import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [README, *DOCS, *sorted((ROOT / "benchmark").rglob("*.md"))]
SHIPPED = "benchmark/pipelines/flux"
CODE = re.compile(r"^(`{3,}).*?^\1`*$", re.DOTALL | re.MULTILINE)


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def links(page):
    """Targets of the page's links and pictures that are no addresses."""
    text = re.sub(r"`[^`\n]*`", "", CODE.sub("", page.read_text()))
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in found if "://" not in target]


def anchors(page):
    """What GitHub calls the page's headings."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    missing = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    assert missing == []


def test_links_are_found():
    """The test above looks at something."""
    assert "docs/adacorrection.md" in links(README)
    assert "samplers" in anchors(ROOT / "docs" / "adacorrection.md")


def test_every_page_is_listed():
    index = ROOT / "docs" / "index.md"
    listed = {(index.parent / target.partition("#")[0]).resolve() for target in links(index)}
    assert {page for page in DOCS if page != index} <= listed


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 120


def test_readme_runs_on_the_shipped_pipeline(monkeypatch):
    """With 4 steps in place of 28."""
    monkeypatch.chdir(ROOT)
    (block,) = [block for block in python_blocks(README) if SHIPPED in block]
    assert "num_inference_steps=28" in block
    names = {}
    exec(block.replace("num_inference_steps=28", "num_inference_steps=4"), names)
    assert isinstance(names["image"], Image.Image) and names["image"].size == (64, 64)


def test_quickstart_runs_on_the_shipped_pipeline(monkeypatch):
    monkeypatch.chdir(ROOT)
    first = python_blocks(ROOT / "docs" / "quickstart.md")[0]
    assert SHIPPED in first
    names = {}
    exec(first.replace("num_inference_steps=28", "num_inference_steps=4"), names)
    assert names["summary"].num_steps == 4 and len(names["summary"].trace.calls) == 4


def test_the_algorithm_of_the_page_is_the_reference():
    """docs/adacorrection.md shows the loop of reference.py as it stands."""
    (loop,) = [
        block
        for block in python_blocks(ROOT / "docs" / "adacorrection.md")
        if block.startswith("for i, (s, s_next)")
    ]
    source = (ROOT / "xfuser_adacorr" / "reference.py").read_text()
    indented = "".join(f"    {line}" if line.strip() else line for line in loop.splitlines(True))
    assert indented in source
