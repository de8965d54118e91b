"""What the site of the documentation needs beyond Markdown; MkDocs calls these functions (``mkdocs.yml``).

The pages are written for a checkout: they link to files of the repository by relative paths. On the site

- a file of the repository that a page links to becomes a page of its own below ``files/``: Markdown as it is, all else
  as a listing. A missing one is an error;
- the decisions (``docs/adr``) are listed in the navigation, and notebooks (``notebooks/``) are pages;
- Markdown that GitHub reads and Python-Markdown reads otherwise is an error;
- whatever a page refers to, in what was built at last, is there, with the anchor, and nothing is loaded from elsewhere;
- docstrings are shown without what only Sphinx or a doctest reads (:class:`Docstrings`);
- external links are only listed, in ``external-links.txt`` beside the site: nothing is asked of another host.
"""

import html as html_text
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent
LINK = re.compile(r"(\]\(|^\[[^\]^]+\]: )([^)\s]+)", re.MULTILINE)
_FENCE = re.compile(r"^( *)(`{3,})[^\n]*\n.*?^\1\2 *$", re.MULTILINE | re.DOTALL)
_BEGINS = re.compile(r"[-*] |\d+\. |\|")
_EXTERNAL = re.compile(r"[a-z]+:")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".json": "json", ".sh": "sh"}

log = logging.getLogger("mkdocs.smes")
external: set[str] = set()


class Docstrings(griffe.Extension):
    """Makes docstrings Markdown (``mkdocs.yml`` names it among the extensions of mkdocstrings)."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: object) -> None:
        """Change the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = in_markdown(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: object) -> None:
        """Change the docstring of a package itself, which is no member of another."""
        self.on_object(obj=pkg, loader=loader)


def in_markdown(docstring: str) -> str:
    """A docstring with names in place of Sphinx's roles, an entry for each name, and sessions of Python in fences."""

    def each(entry: re.Match[str]) -> str:
        return "\n".join(f"    {name}{entry[2]}" for name in entry[1].split(", "))

    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", docstring)
    text = re.sub(r"^    (\w+(?:, \w+)+)(: .*(?:\n {8}.*)*)", each, text, flags=re.MULTILINE)
    text = re.sub(r" *# doctest: \+\w+$", "", text, flags=re.MULTILINE)
    return re.sub(r"^>>> .*(?:\n.+)*", lambda session: f"```pycon\n{session[0]}\n```", text, flags=re.MULTILINE)


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """Text with everything changed that stands in no fenced block."""
    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(text[end:])])


def misread(text: str) -> Iterator[str]:
    """Lines that the site would not show as GitHub does.

    Python-Markdown wants four spaces for what belongs to a list's entry after a blank line, and for an entry in an
    entry; and a blank line before a list or a table.
    """
    fence, before = "", ""
    for number, line in enumerate(text.splitlines(), 1):
        shallow = re.match(r" {1,3}\S", line)
        if mark := re.match(r" *(`{3,})", line):
            if not fence and shallow:
                yield f"line {number}: expected four spaces before {line.strip()}"
            if fence in ("", mark[1]):
                fence = "" if fence else mark[1]
        elif not fence and shallow and (not before or re.match(r" +([-*]|\d+\.) ", line)):
            yield f"line {number}: expected four spaces before {line.strip()[:40]}"
        elif not fence and _BEGINS.match(line) and re.match(r"[^\s#<|]", before):
            in_list = _BEGINS.match(before) is not None and not line.startswith("|")
            if not in_list:
                yield f"line {number}: expected a blank line before {line[:40]}"
        before = "" if mark else line.rstrip()


def repository_path(src_uri: str) -> str:
    """Where in the repository a page of the site comes from."""
    if src_uri.startswith("notebooks/"):
        return src_uri
    if src_uri.startswith("files/"):
        path = src_uri.removeprefix("files/")
        return path if (ROOT / path).exists() else path.removesuffix(".md")
    return f"docs/{src_uri}"


def site_path(path: str) -> str | None:
    """The source of the page that shows a file of the repository, None if there is no such file."""
    found = ROOT / path
    if found.is_dir() and (found / "README.md").exists():
        path, found = f"{path}/README.md", found / "README.md"
    if not found.is_file() or not found.is_relative_to(ROOT):
        return None
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("notebooks/"):
        return path
    return f"files/{path}" if path.endswith(".md") else f"files/{path}.md"


def resolved(target: str, page: str) -> tuple[str, str]:
    """Where a relative link of a page of the repository leads: a path in the repository, and the anchor with its #."""
    name, mark, anchor = target.partition("#")
    path = os.path.normpath(PurePosixPath(page).parent / name) if name else page
    return path, mark + anchor


def linked(text: str) -> list[str]:
    """The targets of all relative links of a page."""
    targets: list[str] = []

    def collect(part: str) -> str:
        targets.extend(target for _, target in LINK.findall(part))
        return part

    outside_fences(text, collect)
    external.update(target for target in targets if _EXTERNAL.match(target))
    return [target for target in targets if not _EXTERNAL.match(target)]


def shown(path: str) -> str:
    """A file of the repository as Markdown."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    fence = "`" * (max(map(len, re.findall("`+", text)), default=2) + 1) if "```" in text else "```"
    head = "---\nsearch: {exclude: true}\n---\n\n"  # who looks for a word looks for pages
    return f"{head}# {path}\n\n{fence}{_LANGUAGES.get(Path(path).suffix, 'text')}\n{text.rstrip()}\n{fence}\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the decisions in the navigation."""
    external.clear()
    assert config.nav is not None
    for entry in config.nav:
        if "Decisions" in entry:
            entry["Decisions"] = [f"adr/{path.name}" for path in sorted((ROOT / "docs/adr").glob("*.md"), key=_rank)]
    return config


def _rank(path: Path) -> tuple[bool, str]:
    return path.name != "README.md", path.name


@event_priority(100)  # before notebooks are made pages
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add notebooks, and the files of the repository that pages link to, however far the chain of links goes."""
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        files.append(File(f"notebooks/{notebook.name}", str(ROOT), config.site_dir, config.use_directory_urls))
    waiting = ["CHANGELOG.md", "CONTRIBUTING.md"]
    for page in files.documentation_pages():
        path = repository_path(page.src_uri)
        for problem in misread(page.content_string) if path.endswith(".md") else ():
            log.warning("%s: %s", path, problem)
        waiting += [resolved(target, path)[0] for target in linked(page.content_string)]
    while waiting:
        path = waiting.pop()
        source = site_path(path)
        if source is None or not source.startswith("files/") or source in files.src_uris:
            continue
        files.append(File.generated(config, source, content=shown(path)))
        if path.endswith(".md"):
            waiting += [resolved(target, path)[0] for target in linked(shown(path))]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links to their pages."""
    path = repository_path(page.file.src_uri)
    if path.endswith(".ipynb"):
        return markdown  # its cells become HTML by themselves

    def rewrite(found: re.Match[str]) -> str:
        if _EXTERNAL.match(found[2]) or found[2].startswith("#"):
            return found[0]
        target, anchor = resolved(found[2], path)
        source = site_path(target)
        if source is None:
            log.warning("%s: %s leads to no file", path, found[2])
            return found[0]
        return found[1] + os.path.relpath(source, PurePosixPath(page.file.src_uri).parent) + anchor

    return outside_fences(markdown, lambda part: LINK.sub(rewrite, part))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The same for a notebook, and without the scripts that would load what it does not use from another host."""
    path = repository_path(page.file.src_uri)
    if not path.endswith(".ipynb"):
        return html

    def rewrite(found: re.Match[str]) -> str:
        target, anchor = resolved(found[1], path)
        file = files.get_file_from_path(site_path(target) or "")
        if file is None:
            log.warning("%s: %s leads to no file", path, found[1])
            return found[0]
        return f'href="{file.url_relative_to(page.file)}{anchor}"'

    html = re.sub(r"<script\b(?:(?!</script>).)*https?://(?:(?!</script>).)*</script>", "", html, flags=re.DOTALL)
    return re.sub(r'href="(?!#|[a-z]+:)([^"]+)"', rewrite, html)


def dead_links(site: Path) -> Iterator[str]:
    """What pages of a built site refer to and is not there, or is to be loaded from another host."""
    pages = {
        path.resolve(): path.read_text(encoding="utf-8") for path in site.rglob("*.html") if path.name != "404.html"
    }
    ids = {path: set(re.findall(r"\s(?:id|name)=[\"']?([^\"'\s>]+)", text)) for path, text in pages.items()}
    for path, text in pages.items():
        here = path.relative_to(site.resolve())
        for loaded in re.findall(r"<(?:script|img|iframe|source)\b[^>]*\ssrc=[\"']?(https?:[^\"'\s>]+)", text):
            yield f"{here}: {loaded} is loaded from another host"
        for loaded in re.findall(r"<link\b[^>]*\shref=[\"']?(https?:[^\"'\s>]+)", text):
            yield f"{here}: {loaded} is loaded from another host"
        for link in set(re.findall(r"<[a-z]+\b[^>]*\s(?:href|src)=[\"']?([^\"'\s>]+)", text)):
            name, _, anchor = html_text.unescape(link).partition("#")
            target = (path.parent / unquote(name)).resolve() if name else path
            if _EXTERNAL.match(link):
                continue
            if not target.exists():
                yield f"{here}: {link} leads to no file"
            elif anchor and target in ids and unquote(anchor) not in ids[target] and not anchor.startswith("__"):
                yield f"{here}: {link} leads to no place of the page"


def on_post_build(config: MkDocsConfig) -> None:
    """Look at what was built, and list the external links."""
    for problem in sorted(dead_links(Path(config.site_dir))):
        log.warning("%s", problem)
    place = Path(config.site_dir).with_name("external-links.txt")
    place.write_text("".join(f"{link}\n" for link in sorted(external)), encoding="utf-8")
    log.info("%d external links, not asked for: %s", len(external), place)
