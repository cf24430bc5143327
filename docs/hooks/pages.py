"""Pages made from other files: the experiments, the reference of each package, and the configuration."""

import ast
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
SOURCE, CONF = ROOT / "src" / "robustdyn", ROOT / "conf"
DOCSTRING_ONLY = """::: {}
    options:
      members: false
      show_root_heading: false
      show_root_toc_entry: false
"""
IN_TABLE = re.compile(r"<autoref[^>]*>default</autoref>\(&#39;([\w/]+)&#39;, &#39;([\w.]+)&#39;\)")
SIGNATURE = re.compile(r'<div class="[^"]*doc-signature[^"]*">.*?</div>', re.DOTALL)
IN_SIGNATURE = re.compile(
    r'<span class="n">default</span><span class="p">\(</span><span class="s2">"([\w/]+)"</span>'
    r'<span class="p">,</span> <span class="s2">"([\w.]+)"</span><span class="p">\)(,?)</span>'
)
LINK = re.compile(r"\]\(([a-z][^):#]*)\)")
FENCED = re.compile(r"(?ms)(^ *```.*?^ *```$)")
EXPERIMENT = re.compile(r"(?<!\]\()(?<![\[/`\w])(`?)experiments/([a-z0-9_]+)(?:/README\.md)?/?\1(?![\w/`])")


def on_files(files: Any, *, config: Any) -> Any:
    """Add the generated pages, and the files beside the experiments that they show or link to."""
    from mkdocs.structure.files import File  # tests read these pages without mkdocs

    for page in sorted(ROOT.glob("experiments/*/*.md")):
        beside = {page.parent / link for link in LINK.findall(page.read_text())}
        for path in [page, *sorted(path for path in beside if path.suffix in (".png", ".py", ".json"))]:
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    made = {f"reference/{name}.md": page for name, page in reference_pages().items()}
    for name, content in {**made, "configuration.md": configuration_page()}.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links between the documentation and the experiments, which the site keeps in one place."""
    if page.file.src_uri.startswith("experiments/"):
        return markdown.replace("](../../docs/", "](../../")
    up = "../" * page.file.src_uri.count("/")
    markdown = markdown.replace(f"]({up}../experiments/", f"]({up}experiments/")
    parts = FENCED.split(markdown)
    parts[::2] = [EXPERIMENT.sub(lambda found: _link(found, up), text) for text in parts[::2]]
    return "".join(parts)


def on_page_content(html: str, **_: Any) -> str:
    """Defaults that are read from ``conf/``, in tables of parameters and in signatures, as their values."""
    html = IN_TABLE.sub(lambda found: str(_default(found[1], found[2])), html)
    return SIGNATURE.sub(
        lambda found: IN_SIGNATURE.sub(
            lambda call: f'{_default(call[1], call[2])}<span class="p">{call[3]}</span>', found[0]
        ),
        html,
    )


def public_names() -> dict[str, dict[str, str]]:
    """The names in ``__all__`` of each package and module, each with the place where it is defined."""
    found = {}
    for path in sorted({*SOURCE.rglob("__init__.py"), *SOURCE.glob("*.py")}):
        module = ".".join(path.with_suffix("").relative_to(ROOT / "src").parts).removesuffix(".__init__")
        body = ast.parse(path.read_text()).body
        listed = [
            ast.literal_eval(node.value)
            for node in body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        if listed:
            origin = {
                alias.asname or alias.name: f"{node.module}.{alias.name}"
                for node in body
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
            }
            found[module] = {name: origin.get(name, f"{module}.{name}") for name in listed[0]}
    return found


def reference_pages() -> dict[str, str]:
    """A page for each package: what its docstring says, and then every public name."""
    pages: dict[str, list[str]] = {}
    for module, names in public_names().items():
        page = pages.setdefault(".".join(module.split(".")[:2]), [])
        page.append(f"# {module}\n" if not page else f"## {module}\n")
        page.append(DOCSTRING_ONLY.format(module))
        shown = [f"::: {names[name]}\n" for name in sorted(names, key=str.casefold)]
        page += [
            entry for entry in shown if entry not in page
        ]  # methods also has the names of its subpackages
    pages["robustdyn.studies"] = ["# robustdyn.studies\n", "::: robustdyn.studies.shared.study\n"]
    return {name.removeprefix("robustdyn."): "\n".join(page) for name, page in pages.items()}


def configuration_page() -> str:
    """Every file of conf/ as it is, group by group, with the choice that a command makes by default."""
    page = [
        "# Configuration\n",
        "Every setting has its default in one file of `conf/`, and this page shows all of these files. A"
        " file is an option of the group in whose folder it is: `data=cifar10` chooses"
        " `data/cifar10.yaml`. A key of a file is set by its group and its name, as in"
        " `data.batch_size=64`. Files that begin with `# @package _global_` set keys of other groups."
        " `robustdyn-train --cfg job` prints the settings of a run without starting it.\n",
        "## Commands\n",
    ]
    page += [_yaml_file(path, opened=path.stem == "train") for path in sorted(CONF.glob("*.yaml"))]
    defaults = dict(
        re.findall(r"^  - (?:override )?([\w/]+): (\w+)", (CONF / "train.yaml").read_text(), re.MULTILINE)
    )
    for folder in sorted({path.parent for path in CONF.rglob("*.yaml")} - {CONF}):
        group = folder.relative_to(CONF).as_posix()
        page.append(f"## {group}\n")
        if defaults.get(group, "null") != "null":
            page.append(
                f"`robustdyn-train` uses `{group}={defaults[group]}` unless you choose another option.\n"
            )
        chosen = defaults.get(group)
        page += [_yaml_file(path, opened=path.stem == chosen) for path in sorted(folder.glob("*.yaml"))]
    return "\n".join(page)


def _default(option: str, key: str) -> Any:
    value = yaml.safe_load((CONF / f"{option}.yaml").read_text())
    for name in key.split("."):
        value = value[name]
    return repr(value)


def _yaml_file(path: Path, *, opened: bool) -> str:
    lines = ["```yaml", *path.read_text().splitlines(), "```"]
    inside = "\n".join(f"    {line}".rstrip() for line in lines)
    name = path.relative_to(CONF).with_suffix("").as_posix()
    return f'???{"+" if opened else ""} abstract "`{name}`"\n\n{inside}\n'


def _link(found: re.Match[str], up: str) -> str:
    name = found[2]
    known = (ROOT / "experiments" / name / "README.md").is_file()
    return f"[`experiments/{name}`]({up}experiments/{name}/README.md)" if known else found[0]
