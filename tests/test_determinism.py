import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from test_data import PATCH, Cases, as_volume, nnunet_augmentation
from test_network import plain_loss
from tiny import build_network

from nnunet_nmsw.trainers.loader import WholeVolumeLoader
from nnunet_nmsw.trainers.views import seed_everything


def train(seed: int, steps: int = 4) -> list[torch.Tensor]:
    """A few steps as the trainer takes them; the losses, and the weights in the end."""
    seed_everything(seed)
    network = build_network(PATCH, downsampling_factor=[2, 2, 2])
    loss, optimizer = plain_loss(network.config), torch.optim.SGD(network.parameters(), 0.01)
    augmentation = nnunet_augmentation()
    batches = WholeVolumeLoader(Cases(), PATCH, 2, 1, augmentation, True)
    losses = []
    for batch, _ in zip(batches, range(steps), strict=False):
        volume = as_volume(batch, augmentation)
        optimizer.zero_grad()
        value = loss(network(volume), volume)
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return [*losses, *(parameter.detach() for parameter in network.parameters())]


def test_the_same_seed_gives_the_same_training():
    first, second, other = train(3), train(3), train(4)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


def test_the_same_seed_gives_the_same_batches_from_workers():
    drawn = []
    for _ in range(2):
        batches = WholeVolumeLoader(Cases(), PATCH, 2, 1, nnunet_augmentation(), True, (5,))
        workers = MultiThreadedAugmenter(batches, None, 2, 2, [0, 1])
        drawn.append([next(workers)["seed"] for _ in range(6)])
        workers._finish()
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 6
