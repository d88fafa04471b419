"""README and docs: short, in sentences that are read once, with commands, flags and links that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_nmsw.commands import compare, demo_flags, export, predict_flags, quantize, retrofit

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
READ_ONCE = [ROOT / "README.md", *sorted((ROOT / "docs" / "how-to").glob("*.md"))]
"""Pages for users, whose sentences are kept short."""

MOST_WORDS_OF_README, MOST_WORDS_OF_A_SENTENCE = 700, 25
COMMANDS = (predict_flags, compare, demo_flags, export, quantize, retrofit)
PARSERS = {module.parser().prog: module.parser() for module in COMMANDS}


@pytest.fixture
def scripts(monkeypatch):
    """Makes the folder's modules importable."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def sentences(text: str) -> list[str]:
    """Sentences of the prose: no code, tables, headings or references."""
    lines = [line for line in without_code(text).splitlines() if not re.match(r"\s*[|#>]|<!--", line)]
    paragraphs = re.split(r"\n\s*\n|\n- |\n(?=!\[)", "\n".join(lines))
    prose = [re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", paragraph) for paragraph in paragraphs]
    return [sentence for text in prose for sentence in re.split(r"(?<=[.?!:;])\s+", text) if sentence.strip()]


def slug(heading: str) -> str:
    """The anchor that forges give a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= MOST_WORDS_OF_README


@pytest.mark.parametrize("file", READ_ONCE, ids=name_of)
def test_sentences_are_short(file):
    long = [s for s in sentences(file.read_text()) if len(s.split()) > MOST_WORDS_OF_A_SENTENCE]
    assert not long


@pytest.mark.parametrize("file", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(file.read_text())):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (file.parent / path).resolve() if path else file
        assert there.exists(), f"{file.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", without_code(there.read_text()), re.MULTILINE)
            assert anchor in map(slug, headings), f"{file.name} links to {target}"


@pytest.mark.parametrize("file", DOCUMENTS, ids=name_of)
def test_our_commands_have_the_flags_that_documents_give_them(file):
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```$", file.read_text(), re.DOTALL | re.MULTILINE))
    for line in re.sub(r"\\\n", " ", blocks).splitlines():
        for command in re.split(r"&&|;|\|", line.partition("#")[0]):
            words = command.split()
            known = next((PARSERS[word] for word in words if word in PARSERS), None)
            if known is not None:
                given = [word for word in words if re.match(r"--?[a-zA-Z]", word)]
                assert set(given) <= set(known._option_string_actions), command


def test_the_site_is_built(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    subprocess.run(command, cwd=ROOT, check=True)
    page = (tmp_path / "site" / "index.html").read_text()
    # Nothing is loaded from elsewhere.
    assert not re.findall(r'(?:src|href)="https?://[^"]*\.(?:js|css|woff2?)"', page)
    for name in ("how-to/prediction", "commands", "python", "results"):
        assert (tmp_path / "site" / name / "index.html").is_file()


@pytest.mark.usefixtures("scripts")
def test_tables_are_of_the_json_files():
    from document_tables import documents

    for file, tables in documents().items():
        for name, table in tables.items():
            assert f"<!-- begin {name} -->\n\n{table}\n\n<!-- end {name} -->" in (ROOT / file).read_text()


@pytest.mark.usefixtures("scripts")
def test_the_reference_of_commands_is_of_this_version():
    from command_reference import FILE, reference

    assert FILE.read_text() == reference()
