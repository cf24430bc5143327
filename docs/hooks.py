"""What mkdocs does not do by itself: formulas as MathML, and the experiments as pages of the site."""

import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
LINK = re.compile(r"\]\(([a-z][^):#]*)\)")
TAG = re.compile(r"\\tag\{(.+?)\}")
EXPERIMENT = re.compile(r"(?<![\[(/])`?experiments/([a-z0-9_]+)(?:/README\.md)?/?`?(?![\w/`])")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages of the experiments, and the files beside them that they show or link to."""
    for page in sorted(ROOT.glob("experiments/*/*.md")):
        beside = {page.parent / link for link in LINK.findall(page.read_text())}
        for path in [page, *sorted(path for path in beside if path.suffix in (".png", ".py", ".json"))]:
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links between the documentation and the experiments, which the site keeps in one place."""
    if page.file.src_uri.startswith("experiments/"):
        return markdown.replace("](../../docs/", "](../../")
    markdown = markdown.replace("](../experiments/", "](experiments/")
    return EXPERIMENT.sub(_link, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw without a script."""
    return FORMULA.sub(_formula, html)


def _link(found: re.Match[str]) -> str:
    name = found[1]
    known = (ROOT / "experiments" / name / "README.md").is_file()
    return f"[`experiments/{name}`](experiments/{name}/README.md)" if known else found[0]


def _formula(found: re.Match[str]) -> str:
    latex = unescape(found[2]).strip()
    tag = TAG.search(latex)
    display = found[1] == "div"
    drawn = convert(TAG.sub("", latex), display="block" if display else "inline")
    if tag is None:
        return drawn
    return f'<div class="equation">{drawn}<span>({tag[1]})</span></div>'
