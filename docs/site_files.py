"""
What mkdocs makes the site of: the pages and files of this repository, each at its own place in it,
so that relative links are the same here and on GitHub. Notebooks become pages.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
# beside what is in docs/
SHOWN = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "sae_lens_alloc/demo/model/README.md",
    "configs/*.yaml",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The theme's files, and those of docs/ and the others by their paths from the root."""
    in_docs = [file for file in files if file.src_dir == config.docs_dir]
    paths = [ROOT / "docs" / file.src_uri for file in in_docs]
    paths += [path for pattern in SHOWN for path in ROOT.glob(pattern)]
    return Files(
        [file for file in files if file not in in_docs]
        + [file for path in sorted(paths) for file in shown(path, config)]
    )


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to notebooks lead to their pages."""
    return markdown.replace(".ipynb)", ".md)")


def shown(path: Path, config: MkDocsConfig) -> Iterator[File]:
    """A file at its place in the repository; of a notebook, a page and its pictures."""
    name = path.relative_to(ROOT).as_posix()
    if path.suffix == ".ipynb":
        page = name.removesuffix(".ipynb")
        pictures = {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
        text, found = MarkdownExporter().from_filename(str(path), pictures)
        yield File.generated(config, f"{page}.md", content=text)
        for picture, content in found["outputs"].items():
            place = f"{Path(name).parent.as_posix()}/{picture}"
            yield File.generated(config, place, content=content)
    elif path.suffix != ".py":
        yield File.generated(config, name, abs_src_path=str(path))
