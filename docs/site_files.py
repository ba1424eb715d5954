"""
What mkdocs makes the site of: the pages and files of this repository, each at its own place in it,
so that relative links are the same here and on GitHub.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

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
        + [shown(path, config) for path in sorted(paths) if path.suffix != ".py"]
    )


def shown(path: Path, config: MkDocsConfig) -> File:
    """A file at its place in the repository."""
    name = path.relative_to(ROOT).as_posix()
    return File.generated(config, name, abs_src_path=str(path))
