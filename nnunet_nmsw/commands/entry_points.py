"""How the commands start: nothing heavy is imported before a signal can end them in one line."""

from __future__ import annotations

import gc

from nnunet_nmsw.commands.predict_flags import read_flags
from nnunet_nmsw.console import end_in_one_line
from nnunet_nmsw.imports import importing


def predict() -> None:
    """The command `nmsw_predict`."""
    end_in_one_line(": predictions that are there are whole, --continue_prediction makes the others")
    args = read_flags()  # what is wrong with them is said before seconds of imports
    with importing():
        if args.max_memory is None and args.engine != "ray" and args.num_parts == 1 and not args.continue_prediction:
            from nnunet_nmsw.inference.reading import read_ahead

            read_ahead(args.i)
        from nnunet_nmsw.commands.predict import main
    try:
        main()
    finally:
        gc.freeze()


def compare() -> None:
    """The command `nmsw_compare`."""
    end_in_one_line(": the folder keeps what is done, the same command goes on from there")
    from nnunet_nmsw.commands.compare import main

    main()


def demo() -> None:
    """The command `nmsw_demo`."""
    end_in_one_line(": the folder keeps what is done")
    from nnunet_nmsw.commands.demo import main

    main()


def export() -> None:
    """The command `nmsw_export`."""
    end_in_one_line(": nothing is written")
    from nnunet_nmsw.commands.export import main

    main()


def quantize() -> None:
    """The command `nmsw_quantize`."""
    end_in_one_line(": folds that are reported are whole")
    from nnunet_nmsw.commands.quantize import main

    main()


def retrofit() -> None:
    """The command `nmsw_retrofit`."""
    end_in_one_line(": the same command goes on from there")
    from nnunet_nmsw.commands.retrofit import main

    main()


if __name__ == "__main__":
    predict()
