"""Text between markers in documents."""

from __future__ import annotations

from pathlib import Path


def replace_between_markers(file: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`.

    Raises:
        ValueError: the file has no such markers.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    content = file.read_text()
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ValueError(f"{file} needs the lines {begin} and {end}, each once")
    before, rest = content.split(begin)
    _, after = rest.split(end)
    file.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")
