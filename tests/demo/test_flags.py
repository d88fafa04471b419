"""The flags of `nmsw_demo`."""

from nnunet_nmsw.commands.demo import QUICK, read_flags, sharing_cores


def test_quick_leaves_what_is_given():
    assert {name: getattr(read_flags(["--quick"]), name) for name in QUICK} == QUICK
    given = vars(read_flags(["--quick", "--training_cases", "9", "-k", "all"]))
    assert {**vars(read_flags(["--quick"])), "training_cases": 9, "k": ["all"]} == given
    assert read_flags([]).tr_baseline != QUICK["tr_baseline"]


def test_trainings_at_the_same_time_share_the_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert sharing_cores(2)["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in sharing_cores(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert sharing_cores(2)["OMP_NUM_THREADS"] == "1"
