"""Runs console commands, each in a process of its own that starts with nnU-Net imported.

What runs is the function of the installed command with its arguments, environment and working folder: the same as the
command, without the six seconds of computation that importing PyTorch and nnU-Net takes. Planning and preprocessing are
nnU-Net's alone: their pools are threads here, which need not import all of it again.

Reads one request a line on standard input, an object in JSON: `arguments` (the name of the command first), `variables`
(the whole environment), `folder`, and the files `stdout` and `stderr`. Writes one line when the command has started,
its number as a process and a process group, and one when it has ended, its exit status.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace


def main() -> None:
    from importlib.metadata import entry_points

    import nnunetv2.inference.predict_from_raw_data
    import nnunetv2.run.run_training
    import nnunetv2.training.nnUNetTrainer.primus.primus_trainers  # noqa: F401  # found on the way to any trainer

    import nnunet_nmsw.commands.predict
    import nnunet_nmsw.trainers  # noqa: F401

    scripts = entry_points(group="console_scripts")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in a shell's background would ignore it
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the requests are the server's
            os.chdir(request["folder"])
            os.environ.clear()
            os.environ.update(request["variables"])
            for descriptor, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            from nnunet_nmsw._register import register

            register()  # as at the start of every interpreter
            sys.argv = request["arguments"]
            if sys.argv[0] in ("nnUNetv2_plan_and_preprocess", "nnUNetv2_preprocess"):
                multiprocessing.get_context = lambda method=None: SimpleNamespace(Pool=ThreadPool)
            sys.exit(scripts[sys.argv[0]].load()())
        with contextlib.suppress(PermissionError):  # the child is further, and has done it itself
            os.setpgid(child, child)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":  # worker processes that nnU-Net spawns import this file
    main()
