"""Run console commands one after the other, each in a process of its own that starts with nnU-Net imported.

    python forked_commands.py "nnUNetv2_train 4 3d_fullres 0" "VARIABLE=value nmsw_predict -i images -o out" ...

What runs is the function of the installed command with its arguments: the same as the command, without the seconds that
importing PyTorch and nnU-Net takes. Variables may be set as in a shell. It ends at the first command that fails, unless
that command is preceded by a minus, as in a makefile.
"""

import os
import shlex
import sys


def main(commands: list[str]) -> int:
    from importlib.metadata import entry_points

    scripts = entry_points(group="console_scripts")
    parsed = [parse(command) for command in commands]
    functions = {name: scripts[name].load() for _, _, (name, *_) in parsed}
    for may_fail, variables, arguments in parsed:
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            os.environ.update(variables)
            sys.argv = arguments
            print(f"$ {shlex.join(arguments)}", flush=True)
            sys.exit(functions[arguments[0]]())
        _, status = os.waitpid(child, 0)
        if status and not may_fail:
            print(f"failed: {shlex.join(arguments)}", file=sys.stderr)
            return 1
    return 0


def parse(command: str) -> tuple[bool, dict[str, str], list[str]]:
    """Whether the command may fail, its variables, its name and arguments."""
    words, variables = shlex.split(command.removeprefix("-")), {}
    while "=" in words[0]:
        name, value = words.pop(0).split("=", 1)
        variables[name] = value
    return command.startswith("-"), variables, words


if __name__ == "__main__":  # worker processes that nnU-Net spawns import this file
    sys.exit(main(sys.argv[1:]))
