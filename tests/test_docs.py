"""Docs that repeat code are made from it."""

import re
from pathlib import Path

from scripts.make_docs import stale_pages

ROOT = Path(__file__).resolve().parents[1]


def test_generated_pages_say_what_the_code_says() -> None:
    assert stale_pages() == []


def test_changelog_and_package_agree_on_the_version() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert version is not None
    assert newest is not None
    assert version.group(1) == newest.group(1)


def test_every_link_of_the_docs_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "models").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_dependency_has_its_line() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    names = re.findall(r'^\s*"?(?:[a-z]+ = \[)?"([a-z][a-z0-9_-]*)[><=]', project, flags=re.MULTILINE)
    names += re.findall(r', "([a-z][a-z0-9_-]*)[><=]', project)
    page = (ROOT / "docs/dependencies.md").read_text()
    missing = {name for name in names if name not in page and name != "setuptools"}
    assert not missing
