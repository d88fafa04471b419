"""Writes docs/commands.md: every flag of every command, from what reads them.

python scripts/command_reference.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_nmsw.commands import compare, demo_flags, export, predict_flags, quantize, retrofit

FILE = Path(__file__).parents[1] / "docs" / "commands.md"
START = """# Commands

Flags of `nnUNetv2_predict` mean the same here. `python scripts/command_reference.py` writes this page.
"""

KINDS = {int: "N", float: "X", str: "NAME", Path: "FOLDER"}


def main() -> None:
    """Write the page."""
    FILE.write_text(reference())


def reference() -> str:
    """The page."""
    parsers = [module.parser() for module in (predict_flags, retrofit, compare, export, quantize, demo_flags)]
    return "\n".join([START, *map(of_command, parsers)])


def of_command(parser: argparse.ArgumentParser) -> str:
    """A command's description and flags."""
    rows = [row(action) for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    return "\n".join([f"## {parser.prog}", "", str(parser.description), "", "| flag | |", "|---|---|", *rows, ""])


def row(action: argparse.Action) -> str:
    """A flag, what it takes, and what it means."""
    takes = ""
    if action.nargs != 0:
        kind = action.type if isinstance(action.type, type) else str
        name = "\\|".join(map(str, action.choices)) if action.choices else action.metavar or KINDS[kind]
        takes = f" {name}" + (" ..." if action.nargs == "+" else "")
    flags = ", ".join(f"`{flag}{takes}`" for flag in action.option_strings)
    help_text = (action.help or "").replace("%%", "%").replace("|", "\\|")
    needed = " Required." if action.required else ""
    return f"| {flags} | {help_text[:1].upper()}{help_text[1:]}.{needed} |"


if __name__ == "__main__":
    main()
