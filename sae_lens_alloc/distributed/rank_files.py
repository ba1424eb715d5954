"""Files of which each rank has its own in a folder."""

from pathlib import Path

from sae_lens_alloc.distributed.ranks import Ranks


def file_of_rank(path: Path, ranks: Ranks) -> Path:
    """`path` for one process alone, "state.rank-03.pt" for "state.pt" of rank 3 of several."""
    if ranks.is_alone:
        return path
    return path.with_name(f"{path.stem}.rank-{ranks.rank:02d}{path.suffix}")


def files_of_ranks(path: Path) -> list[Path]:
    """The files that all ranks of a run have written by `file_of_rank`, by rank."""
    if path.exists():
        return [path]
    found = path.parent.glob(f"{path.stem}.rank-*{path.suffix}")
    return sorted(found, key=lambda file: (len(file.name), file.name))
