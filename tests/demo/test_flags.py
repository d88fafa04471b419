"""The flags of `nmsw_demo`."""

import pytest

from nnunet_nmsw.commands.demo import main, sharing_cores
from nnunet_nmsw.commands.demo_flags import MARK, QUICK, read_flags
from nnunet_nmsw.errors import UserError


def test_quick_leaves_what_is_given():
    assert {name: getattr(read_flags(["--quick"]), name) for name in QUICK} == QUICK
    given = vars(read_flags(["--quick", "--training_cases", "9", "-k", "all"]))
    assert {**vars(read_flags(["--quick"])), "training_cases": 9, "k": ["all"]} == given
    assert read_flags([]).tr_baseline != QUICK["tr_baseline"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("-k foo", '-k is "foo"'),
        ("--training_cases 4", "--training_cases is 4"),
        ("--test_cases 0", "--test_cases is 0"),
        ("-o {file}", "is a file"),
        ("-o {other}", "holds something else"),
        ("-o {earlier}", "holds an earlier demonstration"),
    ],
)
def test_what_would_fail_late_or_lose_something_is_refused_at_once(tmp_path, flags, says):
    places = {name: tmp_path / name for name in ("file", "other", "earlier")}
    places["file"].touch()
    for name, file in (("other", "thesis.tex"), ("earlier", MARK)):
        places[name].mkdir()
        (places[name] / file).touch()
    with pytest.raises(UserError, match=says):
        main(flags.format(**places).split())
    assert (places["earlier"] / MARK).is_file()
    assert read_flags(["-o", str(places["earlier"]), "--overwrite"]).overwrite


def test_trainings_at_the_same_time_share_the_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert sharing_cores(2)["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in sharing_cores(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert sharing_cores(2)["OMP_NUM_THREADS"] == "1"
