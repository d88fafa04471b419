import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from tiny import build_network
from training import PATCH, loader, nnunet_augmentation, step_on

from nnunet_nmsw.trainers.batches import training_volume
from nnunet_nmsw.trainers.randomness import seed_everything


def train(seed: int, steps: int = 4) -> list[torch.Tensor]:
    """A few steps as the trainer takes them; the losses, and the weights in the end."""
    seed_everything(seed)
    network = build_network(PATCH, downsampling_factor=[2, 2, 2])
    optimizer, augmentation = torch.optim.SGD(network.parameters(), 0.01), nnunet_augmentation()
    losses = []
    for batch, _ in zip(loader(augmentation, True, 2, 1), range(steps), strict=False):
        optimizer.zero_grad()
        value = network(step_on(training_volume(batch, augmentation))).loss
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
        batches = loader(nnunet_augmentation(), True, 2, 1, (5,))
        workers = MultiThreadedAugmenter(batches, None, 2, 2, [0, 1])
        drawn.append([next(workers)["seed"] for _ in range(6)])
        workers._finish()
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 6
