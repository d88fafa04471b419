import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib import rc_context
from PIL import Image

from nnunet_nmsw.evaluation.report.plots import STYLE
from nnunet_nmsw.trainers.progress import COLOURS, SampledCase, plot_progress, plot_sampling


def hex_colour(colour):
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])


def shows(image, colour):
    return (np.abs(image[..., :3].astype(int) - hex_colour(colour)).sum(-1) < 12).sum()


def test_progress_has_a_line_for_every_part(tmp_path):
    epochs = 5
    logged = {name: np.linspace(1, 0, epochs).tolist() for name in ("loss_local", "loss_global", "loss_fused")}
    logged |= {"entropy": [3.0] * epochs, "foreground_share": [0.5] * epochs, "benefit": [0.01] * epochs}
    logged["fusion_weights"] = np.random.default_rng(0).random((epochs, 9)).tolist()
    plot_progress(logged, tmp_path / "plain.png")
    with rc_context({"font.size": 40}):  # as nnU-Net leaves it
        plot_progress(logged, tmp_path / "progress_nmsw.png")
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "progress_nmsw.png").read_bytes()
    image = np.asarray(Image.open(tmp_path / "progress_nmsw.png"))
    assert [shows(image, colour) > 100 for colour in COLOURS[:4]] == [True] * 4
    assert {path.name for path in tmp_path.iterdir()} == {"plain.png", "progress_nmsw.png"}


def test_sampling_shows_windows_of_the_slice_with_most_foreground(tmp_path):
    labels = torch.zeros(20, 24, 28)
    labels[12:15, 5:15, 5:15] = 1
    coarse = torch.zeros(3, 10, 12, 14)
    coarse[1, 6:8, 3:7, 3:7] = 5
    starts = {"cut": torch.tensor([[8, 4, 4]]), "elsewhere": torch.tensor([[0, 4, 4]])}
    drawn = {}
    for name, starts_K3 in starts.items():
        case = SampledCase(name, torch.rand(labels.shape), labels, coarse, coarse[1], starts_K3, (8, 8, 8), (2, 2, 2))
        plot_sampling([case, case], "epoch 3", tmp_path / "sampling" / f"{name}.png")
        drawn[name] = shows(np.asarray(Image.open(tmp_path / "sampling" / f"{name}.png"))[:, :400], COLOURS[1])
    assert drawn["cut"] > 100 > drawn["elsewhere"]


@pytest.mark.parametrize("name", ["$", "a$b$c", "$\\frac{1}{$", "a_b^c", "ä%"])
def test_names_are_no_formulas(tmp_path, name):
    labels = torch.zeros(8, 8, 8)
    case = SampledCase(
        name, labels, labels, torch.zeros(3, 4, 4, 4), torch.zeros(4, 4, 4), torch.zeros(1, 3), (4, 4, 4), (2, 2, 2)
    )
    plot_sampling([case], name, tmp_path / "sampling.png")
    with plt.rc_context(STYLE):  # of the report
        figure, axes = plt.subplots()
        axes.set(title=name, xlabel=name)
        axes.plot([1, 2], label=name)
        axes.legend()
        figure.savefig(tmp_path / "plot.png")
        plt.close(figure)
    assert (tmp_path / "plot.png").stat().st_size > 1000
