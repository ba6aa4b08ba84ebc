"""Pages of the site that lie outside docs/: the readme, other pages it links to, the API reference.

MkDocs calls the functions whose names begin with `on_`. Pages keep the links that work in the
repository; `on_page_markdown` turns them into those of the site.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

import lgvit_fast

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lgvit_fast"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("examples/*.md")]
LINK = re.compile(r"(\]\()(?!https?:)([^)#\s]+)")


def on_config(config):
    """Puts pages that mkdocs.yml does not place at the end of "Use", so that none is lost."""
    placed = (ROOT / "mkdocs.yml").read_text()
    (use,) = (section["Use"] for section in config.nav if "Use" in section)
    use += [page.name for page in sorted(ROOT.glob("docs/*.md")) if page.name not in placed]
    return config


def on_files(files: Files, config) -> Files:
    """Adds the pages outside docs/, what they link to, and a reference page for every public module."""
    for page in PAGES:
        path = page.relative_to(ROOT).as_posix()
        files.append(File.generated(config, site_path(path), content=page.read_text()))
    pages = [*PAGES, *ROOT.glob("docs/*.md")]
    for target in {target for page in pages for target in linked(page)}:
        if not target.startswith("docs/") and not target.endswith(".md"):
            content = (ROOT / target).read_bytes()
            files.append(File.generated(config, target, content=content))
    files.append(File.generated(config, "reference/index.md", content=overview()))
    for module in public_modules():
        content = f"# {module}\n\n::: {module}\n"
        files.append(File.generated(config, f"reference/{module}.md", content=content))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Turns links between files of the repository into links between pages of the site."""
    place = posixpath.dirname(page.file.src_uri)
    source = source_path(page.file.src_uri)

    def relative(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        return match[1] + posixpath.relpath(site_path(target), place or ".")

    return markdown if source.startswith("reference/") else LINK.sub(relative, markdown)


def linked(page: Path) -> set[str]:
    """The files of the repository that a page links to."""
    place = page.parent.relative_to(ROOT).as_posix()
    found = {match[2] for match in LINK.finditer(page.read_text())}
    return {posixpath.normpath(posixpath.join(place, target)) for target in found}


def site_path(path: str) -> str:
    """Where a file of the repository lies on the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def source_path(uri: str) -> str:
    """Where a page of the site lies in the repository."""
    outside = {site_path(page.relative_to(ROOT).as_posix()): page for page in PAGES}
    if uri in outside:
        return outside[uri].relative_to(ROOT).as_posix()
    return uri if uri.startswith("reference/") else f"docs/{uri}"


def public_modules() -> list[str]:
    """The modules of the package without an underscore, packages first."""
    names = []
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = ("lgvit_fast", *file.relative_to(PACKAGE).with_suffix("").parts)
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            names.append(".".join(parts))
    return sorted(names)


def overview() -> str:
    """The names of the package's top, and a list of all modules."""
    rows = ["# API reference", "", "## Names of `lgvit_fast`", ""]
    for name in lgvit_fast.__all__:
        value = getattr(lgvit_fast, name)
        if hasattr(value, "__qualname__"):
            rows.append(f"- [`{name}`][{value.__module__}.{value.__qualname__}]")
    rows += ["", "## Modules", ""]
    rows += [f"- [{module}]({module}.md)" for module in public_modules()]
    return "\n".join(rows) + "\n"
