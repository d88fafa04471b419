"""The flags of `nmsw_demo`."""

from nnunet_nmsw.commands.demo import QUICK, read_flags


def test_quick_leaves_what_is_given():
    assert {name: getattr(read_flags(["--quick"]), name) for name in QUICK} == QUICK
    given = vars(read_flags(["--quick", "--training_cases", "9", "-k", "all"]))
    assert {**vars(read_flags(["--quick"])), "training_cases": 9, "k": ["all"]} == given
    assert read_flags([]).tr_baseline != QUICK["tr_baseline"]
