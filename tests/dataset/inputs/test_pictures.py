"""What is known of a picture's patches."""

import numpy as np
import pytest

from dataset.inputs.pictures import valid_share


def test_valid_share_of_patches():
    depth = np.full((64, 128, 3), 0.5, np.float32)
    depth[:, :32] = np.nan
    share = valid_share(depth, grid=4, image_tokens="anyres").reshape(4, 4)
    assert np.allclose(share, [[0, 1, 1, 1]] * 4)
    padded = valid_share(depth, grid=4, image_tokens="one_tile").reshape(4, 4)
    assert np.allclose(padded, [[0] * 4, [0, 1, 1, 1], [0, 1, 1, 1], [0] * 4])
    depth[:, 32:48] = np.nan
    assert valid_share(depth, grid=4, image_tokens="anyres").reshape(4, 4)[0, 1] == pytest.approx(0.5)
