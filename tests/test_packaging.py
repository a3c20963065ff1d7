"""setup.py says what the package is and needs."""

import ast
import runpy
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import xfuser_adacorr

ROOT = Path(__file__).parents[1]
NAMES_ON_PYPI = {"yaml": "PyYAML"}
COMES_WITH = {"yunchang": "xfuser"}


@pytest.fixture
def metadata(monkeypatch):
    """The arguments that setup.py gives to setuptools."""
    given = {}
    monkeypatch.setattr("setuptools.setup", lambda **options: given.update(options))
    runpy.run_path(str(ROOT / "setup.py"))
    return given


def imported_packages():
    """Top-level names of what the package imports, anywhere in it, and is not its own."""
    found = set()
    for path in (ROOT / "xfuser_adacorr").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    own = found - sys.stdlib_module_names - {"xfuser_adacorr"}
    return {NAMES_ON_PYPI.get(name, COMES_WITH.get(name, name)) for name in own}


def test_the_version_is_that_of_the_package(metadata):
    assert metadata["version"] == xfuser_adacorr.__version__


def test_it_requires_what_it_imports_and_nothing_else(metadata):
    required = {Requirement(line).name for line in metadata["install_requires"]}
    assert required == imported_packages()


def test_xfuser_is_required_on_linux_alone(metadata):
    (xfuser,) = [r for r in map(Requirement, metadata["install_requires"]) if r.name == "xfuser"]
    assert xfuser.marker.evaluate({"platform_system": "Linux"})
    assert not xfuser.marker.evaluate({"platform_system": "Darwin"})
