"""How the command starts."""

import gc

import pytest

from nnunet_nmsw.start import importing


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
