"""The site: it builds without a warning, and the API page shows whole docstrings."""

import ast
import functools
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="needs the extra `docs`")
griffe = pytest.importorskip("griffe", reason="needs the extra `docs`")

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
API = DOCS / "api.md"
# Elements that HTML never closes.
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


class Page(HTMLParser):
    """Text of a page with the sections of its docstrings.

    Attributes:
        sections: (name, number of list items, text of code blocks) of every docstring section.
        text: everything that a reader sees.
        quotes: number of blockquotes.
    """

    def __init__(self, html):
        super().__init__()
        self.path, self.sections, self.text, self.quotes = [], [], "", 0
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        classes = dict(attrs).get("class") or ""
        self.quotes += tag == "blockquote"
        if tag not in VOID:
            self.path.append((tag, classes))
        if tag == "li" and "doc-section-item" in classes:
            self.sections[-1]["items"] += 1

    def handle_endtag(self, tag):
        while self.path and self.path.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if any(tag in ("script", "style") for tag, _ in self.path):
            return
        self.text += data
        if any("doc-section-title" in classes for _, classes in self.path):
            self.sections.append({"name": data.strip().rstrip(":"), "items": 0, "code": ""})
        elif self.sections and any(tag == "pre" for tag, _ in self.path):
            self.sections[-1]["code"] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def api(site):
    return Page((site / "api" / "index.html").read_text(encoding="utf-8"))


@functools.cache
def documented():
    """Return every docstring that the API page renders."""
    loaded = griffe.load("optical", search_paths=[ROOT])
    docstrings = []
    for name in re.findall(r"^::: optical\.(\S+)$", API.read_text(), re.MULTILINE):
        target = loaded[name]
        docstrings += with_members(target.final_target if target.is_alias else target)
    return docstrings


def with_members(target):
    if target.docstring:
        yield target.docstring
    if target.is_class or target.is_module:
        for member in target.members.values():
            if not member.is_alias and not member.name.startswith("_"):
                yield from with_members(member)


def entries(docstring, title):
    """Count the entries of a section of a docstring: its lines of the smallest indentation."""
    match = re.search(rf"^{title}:\n((?:[ \t]+\S.*\n?|\n)+)", docstring, re.MULTILINE)
    return len(re.findall(r"^    \S", match[1], re.MULTILINE)) if match else None


def test_every_page_is_built_and_in_the_navigation(site):
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")}
    built = {path.parent.relative_to(site).as_posix() for path in site.rglob("index.html")}
    assert pages - {"index"} <= built
    # MkDocs builds pages outside the navigation without a warning.
    listed = re.findall(r"([\w/]+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(pages)


def test_every_example_is_a_code_block(api):
    examples = [section for section in api.sections if section["name"] == "Examples"]
    assert len(examples) == sum(">>> " in docstring.value for docstring in documented()) > 0
    for section in examples:
        assert section["code"].startswith(">>> "), section
        assert "\n" in section["code"]
    assert not api.quotes


def test_lists_have_one_item_per_entry(api):
    titles = {"Args": "Parameters", "Attributes": "Attributes", "Raises": "Raises"}
    expected = []
    for docstring in documented():
        for title, name in titles.items():
            count = entries(docstring.value, title)
            expected += [(name, count)] if count else []
        expected += [("Returns", 1)] if entries(docstring.value, "Returns") else []
    names = ("Returns", *titles.values())
    shown = [(s["name"], s["items"]) for s in api.sections if s["name"] in names]
    assert sorted(shown) == sorted(expected)


def test_formulas_with_angle_brackets_are_visible(api):
    assert "<plan, cost>" in api.text
    assert "<plan, cost(student_i, teacher_j)>" in api.text
    for docstring in documented():
        for formula in re.findall(r"``([^`\n]*<[^`\n]*)``", docstring.value):
            assert formula in api.text, formula


@pytest.mark.parametrize("path", sorted((ROOT / "optical").rglob("*.py")), ids=lambda p: p.stem)
def test_docstrings_follow_the_convention(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
            continue
        text = ast.get_docstring(node) or ""
        assert not re.search(r"^Example:$", text, re.MULTILINE), "write Examples:"
        code = r"``[^`]*``|`[^`\n]*`|^>>>.*$|^    .*<.*$"
        prose = re.sub(code, "", text, flags=re.MULTILINE)
        if not isinstance(node, ast.Module):  # module docstrings are not rendered
            assert not re.search(r"<\w[^<>\n]*>", prose), "put angle brackets in double backticks"
