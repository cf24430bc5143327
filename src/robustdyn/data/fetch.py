"""Download of official data files: resumable, checksummed, one process at a time.

pooch checks the checksum and moves a file to its place only if it is right. This module adds that an
interrupted transfer resumes where it stopped, also in a later run.
"""

import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import pooch
import requests
from filelock import FileLock
from tqdm import tqdm

from robustdyn.data.source import Download, Source, Split
from robustdyn.errors import DataFileError

TIMEOUT = (10.0, 60.0)  # seconds: to connect, between two pieces
PIECE_BYTES = 1 << 16
NO_FILES_NEEDED = "data=digits needs no files"


def ensure_files(
    source: Source, root: Path, splits: Sequence[Split], *, download: bool, retries: int = 2
) -> None:
    """Returns when the files of ``splits`` are under ``root``, having downloaded them if need be.

    Args:
        source: The data set.
        root: The data root, an absolute path.
        splits: Which splits are needed.
        download: Whether downloading is allowed.
        retries: How often an interrupted download is resumed before giving up.

    Raises:
        DataFileError: They are not there, and not allowed or impossible to get.
    """
    missing = source.missing(root, splits)
    if not missing:
        return
    looked_for = f"{source.title} files not found in {root} (looked for {missing})"
    if not source.missing(root.parent, splits):
        raise DataFileError(f"{looked_for}; they are one folder up, so set data.root={root.parent}")
    if not download:
        packed = [name for name in source.archives if (root / name).is_file()]
        remedy = f"unpack {packed[0]} there (tar -xzf {packed[0]}), or " if packed else ""
        remedy += "set data.download=true, or data.root to where they are"
        if not source.missing(root, ["train"]):
            remedy += ", or data.test_from_train to test on the last training images"
        raise DataFileError(f"{looked_for}; {remedy}; {NO_FILES_NEEDED}")
    try:
        _download_missing(source, root, splits, retries)
    except (OSError, ValueError, tarfile.TarError) as error:  # requests' errors are OSErrors
        raise DataFileError(
            f"{looked_for} and the download failed ({_reason(error)}); run again to resume it, or set"
            f" data.root to where the files are; {NO_FILES_NEEDED}"
        ) from error
    if missing := source.missing(root, splits):
        raise DataFileError(f"{source.title} files were downloaded to {root}, but without {missing}")


def _download_missing(source: Source, root: Path, splits: Sequence[Split], retries: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    # The runs of a sweep share the root: one downloads, the others wait and find the files.
    with FileLock(root / f".{source.title.lower()}.lock"):
        if source.missing(root, splits):
            for item in source.downloads(root, splits):
                retrieve(item, root, retries=retries)


def retrieve(item: Download, root: Path, *, retries: int) -> Path:
    """Downloads one file into its folder under ``root`` and unpacks it if it is an archive.

    Args:
        item: What to download; a file already there with the right checksum is not downloaded again.
        root: The data root.
        retries: How often to resume after an interrupted transfer or start over after a wrong checksum.

    Returns:
        Path of the file.

    Raises:
        requests.RequestException: The server cannot be reached or refuses.
        ValueError: The checksum is wrong.
    """
    folder = root / item.folder
    cache = pooch.create(
        path=folder,
        base_url="",
        registry={item.name: item.known_hash},
        urls={item.name: item.url},
        retry_if_failed=retries,
    )
    path = Path(cache.fetch(item.name, downloader=ResumableDownloader(folder / f"{item.name}.part")))
    if item.unpack:
        unpack(path, folder)
    return path


class ResumableDownloader:
    """Downloader for pooch that keeps what it has in a ``.part`` file and requests only the rest.

    A complete part file is given to pooch, which deletes it if its checksum is wrong. The next try then
    starts from nothing and not from bad bytes.
    """

    def __init__(self, part: Path) -> None:
        """Keeps unfinished transfers in ``part``."""
        self.part = part

    def __call__(self, url: str, output_file: str, pooch: Any, check_only: bool = False) -> None:
        """Downloads ``url`` into ``output_file``.

        Raises:
            requests.RequestException: The transfer failed; the part file keeps what has arrived.
        """
        have = self.part.stat().st_size if self.part.exists() else 0
        with _request(url, have) as response:
            if response.status_code == requests.codes.requested_range_not_satisfiable:
                self._nothing_left(have, response)
            else:
                self._receive(response, have)
        shutil.move(self.part, output_file)

    def _nothing_left(self, have: int, response: requests.Response) -> None:
        """The part file is complete, or it is not of this file."""
        if response.headers.get("Content-Range") != f"bytes */{have}":
            self._start_over("the partial file is not of this file")

    def _start_over(self, why: str) -> NoReturn:
        self.part.unlink()
        raise requests.ConnectionError(why)

    def _receive(self, response: requests.Response, have: int) -> None:
        response.raise_for_status()
        resumed = response.status_code == requests.codes.partial_content
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            self._start_over("the server sent another range than was asked for")
        start = have if resumed else 0  # a server without ranges sends everything again
        total = start + int(response.headers.get("Content-Length", 0))
        with (
            self.part.open("ab" if resumed else "wb") as file,
            tqdm(
                total=total or None,
                initial=start,
                unit="B",
                unit_scale=True,
                desc=self.part.stem,
                disable=None,  # no bar where there is no terminal
            ) as bar,
        ):
            for piece in response.iter_content(PIECE_BYTES):
                file.write(piece)
                bar.update(len(piece))
        if self.part.stat().st_size < total:
            raise requests.ConnectionError("the transfer ended early")


def _request(url: str, have: int) -> requests.Response:
    headers = {"Accept-Encoding": "identity"}  # byte positions count the file, not a compressed form
    if have:
        headers["Range"] = f"bytes={have}-"
    return requests.get(url, headers=headers, stream=True, timeout=TIMEOUT)


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a tar archive into ``folder``; files that are there already stay as they are.

    Raises:
        tarfile.TarError: It is no archive, or a member would land outside ``folder``.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpack-") as scratch, tarfile.open(archive) as tar:
        tar.extractall(scratch, filter="data")  # the filter refuses links and paths that lead outside
        for path in sorted(Path(scratch).rglob("*")):
            target = folder / path.relative_to(scratch)
            if path.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)  # one step: nobody sees half a file


def _reason(error: Exception) -> str:
    """One short phrase; requests' own texts fill a screen."""
    if isinstance(error, requests.HTTPError):
        return f"HTTP status {error.response.status_code}"
    if isinstance(error, requests.Timeout):
        return "the server does not answer in time"
    if isinstance(error, requests.RequestException):
        url = getattr(error.request, "url", None)
        return f"no connection to {urlsplit(url).hostname}" if url else "the transfer broke off"
    if isinstance(error, ValueError):
        return "wrong checksum"
    return getattr(error, "strerror", None) or type(error).__name__
