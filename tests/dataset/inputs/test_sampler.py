"""The order of images."""

from dataset.inputs.sampler import ImageOrder


def test_an_image_that_comes_again_in_an_epoch_is_drawn_anew():
    order = ImageOrder(3, seed=0, shuffle=True, size=7)
    keys = []
    for epoch in range(2):
        order.set_epoch(epoch)
        keys += list(order)
    assert len(keys) == len(set(keys)) == 14 and {index for _, index in keys} == {0, 1, 2}
