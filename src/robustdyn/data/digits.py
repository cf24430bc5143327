"""The handwritten digits that come with scikit-learn: 1,797 real images, no file and no download."""

import numpy as np
import torch

from robustdyn.data.tensors import ImageTensors

WHITE = 16  # scikit-learn counts the inked pixels of a 4x4 block: 0 ... 16


def read_digits() -> ImageTensors:
    """All 1,797 digits: images uint8 (N, 1, 8, 8) with 16 scaled to 255, labels 0 ... 9."""
    from sklearn.datasets import load_digits  # a second or two, which other data sets need not wait for

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / WHITE)).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    return ImageTensors(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels))
