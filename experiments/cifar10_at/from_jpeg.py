"""CIFAR-10 from a JPEG copy, in the official binary layout that ``data=cifar10`` reads.

    python experiments/cifar10_at/from_jpeg.py COPY data/cifar10_jpeg

COPY holds ``train.npz`` and ``test.npz``, each with three arrays: ``jpeg``, uint8, the files one after
another; ``offset``, int64, (N + 1,), image i being ``jpeg[offset[i]:offset[i + 1]]``; ``label``, uint8, (N,),
0 to 9; images in the official order. JPEG is lossy: accuracies on such a copy are not those of CIFAR-10, so
the folder written to must have "jpeg" in its name, which a run then records as ``data.root``.
Decodes with Pillow, which matplotlib brings along; decoders may differ in the last bit.
"""

import argparse
import io
import shutil
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robustdyn.data.cifar import CIFAR10_FILES, PIXELS, SHAPE
from robustdyn.data.source import Split
from robustdyn.errors import ConfigError, DataFileError
from robustdyn.run.status import status_of

LAYOUT = next(layout for layout in CIFAR10_FILES.layouts if not layout.pickled)
SPLITS: tuple[Split, ...] = ("train", "test")
NOTE = """\
CIFAR-10 (JPEG copy): decoded from lossy JPEG files, not the official pixels. Accuracies measured on these
images are not comparable with published ones. Written by experiments/cifar10_at/from_jpeg.py.
"""


class _Copy(NamedTuple):
    """One split: its file, the JPEG files in it one after another, where each begins, the labels."""

    source: Path
    jpeg: bytes
    offset: NDArray[np.int64]
    label: NDArray[np.uint8]

    def image(self, index: int) -> NDArray[np.uint8]:
        """Planes red, green, blue: uint8, (3, 32, 32)."""
        file = io.BytesIO(self.jpeg[self.offset[index] : self.offset[index + 1]])
        try:
            with Image.open(file, formats=["JPEG"]) as image:
                planes = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        except OSError as error:
            raise DataFileError(f"{self.source}: image {index} is no JPEG; get it again") from error
        if planes.shape != SHAPE:
            rows, columns = planes.shape[1:]
            raise DataFileError(
                f"{self.source}: image {index} is {rows}x{columns}, not {SHAPE[1]}x{SHAPE[2]}"
            )
        return planes


def convert(copy: Path, root: Path) -> bool:
    """Write ``root/cifar-10-batches-bin/``, whole or not at all; False if it is there already.

    Raises:
        ConfigError: The name of ``root`` does not say that it is a JPEG copy.
        DataFileError: A file of ``copy`` is not there or not what it should be.
    """
    if "jpeg" not in root.name.lower():
        raise ConfigError(f"{root}: the folder's name must say that its pixels are lossy, e.g. cifar10_jpeg")
    folder = root / LAYOUT.folder
    if folder.is_dir():
        return False
    contents = {split: _read(copy / f"{split}.npz") for split in SPLITS}
    unfinished = folder.with_suffix(".part")  # a killed conversion leaves nothing that would be read
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for split, content in contents.items():
        _write(content, [unfinished / name for name in getattr(LAYOUT, split)])
    (root / "README.txt").write_text(NOTE)
    unfinished.rename(folder)
    return True


def _read(source: Path) -> _Copy:
    if not source.is_file():
        raise DataFileError(f"{source}: no such file; give the folder that holds it")
    try:
        with np.load(source, allow_pickle=False) as content:
            jpeg, offset, label = (content[name] for name in ("jpeg", "offset", "label"))
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise DataFileError(f"{source}: no arrays jpeg, offset and label ({error}); get it again") from error
    whole = (
        (jpeg.dtype, offset.dtype, label.dtype) == (np.uint8, np.int64, np.uint8)
        and jpeg.ndim == label.ndim == 1
        and offset.shape == (len(label) + 1,)
        and offset[0] == 0
        and offset[-1] == len(jpeg)
        and bool((np.diff(offset) > 0).all())
        and bool((label < CIFAR10_FILES.num_classes).all())
    )
    if not whole:
        raise DataFileError(f"{source}: jpeg, offset and label do not fit together; get it again")
    return _Copy(source, jpeg.tobytes(), offset, label)


def _write(copy: _Copy, targets: list[Path]) -> None:
    """The images in equal parts, one file each."""
    for target, part in zip(targets, np.array_split(np.arange(len(copy.label)), len(targets)), strict=True):
        pixels = np.array([copy.image(i) for i in part.tolist()], np.uint8).reshape(len(part), PIXELS)
        np.concatenate([copy.label[part, None], pixels], axis=1).tofile(target)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("copy", type=Path, metavar="COPY", help="folder of train.npz and test.npz")
    parser.add_argument("root", type=Path, metavar="ROOT", help='for data.root; "jpeg" in its name')
    arguments = parser.parse_args()

    def work() -> None:
        done = "written" if convert(arguments.copy, arguments.root) else "there already"
        print(f"{arguments.root / LAYOUT.folder}: {done}")

    return status_of(work)


if __name__ == "__main__":
    sys.exit(main())
