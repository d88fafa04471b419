"""How the command starts."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnunet_nmsw.commands.entry_points import importing

POOLS = """
import multiprocessing, time
from nnunet_nmsw.console import end_in_one_line
end_in_one_line(": the hint")
print("READY", flush=True)
for _ in range(40):  # as nnU-Net does: workers are terminated when they have hardly started
    with multiprocessing.Pool(8) as pool:
        pool.map(abs, [1])
print("DONE", flush=True)
time.sleep(60)
"""


def test_pools_end_although_signals_are_handled():
    """A forked worker that forgets the signal of its pool is waited for for ever."""
    process = subprocess.Popen([sys.executable, "-c", POOLS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["READY\n", "DONE\n"]
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert errors.strip() == "terminated: the hint"
    assert process.returncode == 143


def test_a_command_ends_although_nobody_reads_what_it_prints():
    """Ctrl-C behind a pipe ends its reader, too."""
    code = (
        "import signal, time\nfrom nnunet_nmsw.console import end_in_one_line\n"
        # What runs in the background of a shell, these tests perhaps, ignores Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\nend_in_one_line()\n"
        "print('READY', flush=True)\nprint('not flushed')\n"
        "while True:\n    try:\n        time.sleep(60)\n    except Exception:\n        pass\n"
    )
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=variables
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"READY\n"
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert process.stderr.read().decode().strip() == "interrupted"
    process.stderr.close()


FOLLOWING = """
import os, subprocess, sys, time
from nnunet_nmsw.console import follow_parent
if len(sys.argv) == 1:
    child = subprocess.Popen([sys.executable, __file__, __file__ + ".ready"])
    print(child.pid, flush=True)
    time.sleep(60)
follow_parent()
open(sys.argv[1], "w").close()
time.sleep(60)
"""


def test_a_worker_ends_when_its_parent_is_gone(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(FOLLOWING)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    until = time.monotonic() + 60
    while time.monotonic() < until and not Path(f"{script}.ready").exists():  # before, its parent could be another one
        time.sleep(0.1)
    assert is_running(child)
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while time.monotonic() < until and is_running(child):
        time.sleep(0.1)
    assert not is_running(child)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat") as file:  # nobody may have waited for it
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize("enabled", [True, False])
def test_what_is_imported_is_left_out_of_the_search_for_garbage(enabled):
    kept = []

    @importing()
    def fail():
        assert not gc.isenabled()
        kept.extend([] for _ in range(100))
        raise KeyError

    (gc.enable if enabled else gc.disable)()
    before = gc.get_freeze_count()
    try:
        with pytest.raises(KeyError):
            fail()
        assert gc.isenabled() == enabled
        assert gc.get_freeze_count() >= before + len(kept)
    finally:
        gc.unfreeze()
        gc.enable()
