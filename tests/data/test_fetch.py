import hashlib
import http.server
import io
import re
import tarfile
import threading
from dataclasses import replace

import pooch.core
import pytest

from robustdyn.data.cifar import CIFAR10_FILES, CIFAR100_FILES
from robustdyn.data.fetch import ensure_files, retrieve
from robustdyn.data.source import Download
from robustdyn.data.svhn import SVHN_FILES
from robustdyn.errors import DataFileError
from tests.data.official import svhn, write_cifar100, write_svhn

BOTH = ("train", "test")
CONTENT = bytes(range(256)) * 2000  # 512,000 bytes: several pieces


class Server(http.server.ThreadingHTTPServer):
    """Serves ``content``; breaks off after ``cut`` bytes as often as ``cuts`` says."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.cut, self.cuts, self.status = CONTENT, True, 0, 0, 200
        self.asked = []

    def download(self, content=None, **changes):
        digest = hashlib.md5(content or self.content).hexdigest()
        item = Download(
            f"http://127.0.0.1:{self.server_port}/file.bin", f"md5:{digest}", "svhn", unpack=False
        )
        return replace(item, **changes)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append(asked)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and server.ranges else 0
        total = len(server.content)
        if server.status != 200:
            return self.send_error(server.status)
        if start >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Length", str(total - start))
        self.end_headers()
        if server.cuts:
            server.cuts -= 1
            self.wfile.write(server.content[start : start + server.cut])
            return None
        return self.wfile.write(server.content[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(pooch.core.time, "sleep", lambda _: None)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_whole_transfer(tmp_path, server):
    path = retrieve(server.download(), tmp_path, retries=0)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None]
    assert names(tmp_path / "svhn") == ["file.bin"]
    retrieve(server.download(), tmp_path, retries=0)
    assert len(server.asked) == 1  # it is there: nothing is transferred


def test_a_broken_transfer_goes_on_by_itself(tmp_path, server):
    server.cut, server.cuts = 200_000, 1
    assert retrieve(server.download(), tmp_path, retries=1).read_bytes() == CONTENT
    first, second = server.asked
    assert first is None
    assert 0 < int(second.removeprefix("bytes=").removesuffix("-")) <= 200_000


def test_a_broken_transfer_goes_on_in_a_later_run(tmp_path, server):
    server.cut, server.cuts = 200_000, 1
    with pytest.raises(OSError, match=r"Connection broken|ended early"):
        retrieve(server.download(), tmp_path, retries=0)
    part = tmp_path / "svhn" / "file.bin.part"
    have = part.stat().st_size
    assert names(tmp_path / "svhn") == [part.name]
    assert part.read_bytes() == CONTENT[:have]
    assert retrieve(server.download(), tmp_path, retries=0).read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={have}-"]
    assert names(tmp_path / "svhn") == ["file.bin"]


def test_a_server_without_ranges_sends_all_again(tmp_path, server):
    server.cut, server.cuts, server.ranges = 200_000, 1, False
    assert retrieve(server.download(), tmp_path, retries=1).read_bytes() == CONTENT


def test_a_complete_part_file_is_used(tmp_path, server):
    part = tmp_path / "svhn" / "file.bin.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT)
    assert retrieve(server.download(), tmp_path, retries=0).read_bytes() == CONTENT
    assert names(part.parent) == ["file.bin"]


@pytest.mark.parametrize("size", [1000, len(CONTENT), len(CONTENT) + 1])
def test_a_wrong_part_file_does_no_lasting_harm(tmp_path, server, size):
    part = tmp_path / "svhn" / "file.bin.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * size)
    with pytest.raises((ValueError, OSError)):
        retrieve(server.download(), tmp_path, retries=0)
    assert names(part.parent) == []
    assert retrieve(server.download(), tmp_path, retries=0).read_bytes() == CONTENT


def test_a_wrong_file_is_refused_and_forgotten(tmp_path, server):
    item = server.download()
    server.content = CONTENT[::-1]
    with pytest.raises(ValueError, match="hash"):
        retrieve(item, tmp_path, retries=1)
    assert server.asked == [None, None]
    assert names(tmp_path / "svhn") == []


def archive(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def cifar100(server):
    item = server.download(folder=".", unpack=True)
    return replace(CIFAR100_FILES, archive=item)


def test_an_archive_is_downloaded_and_unpacked_once(tmp_path, server):
    write_cifar100(tmp_path / "made", "binary")
    folder = tmp_path / "made" / "cifar-100-binary"
    files = {f"cifar-100-binary/{path.name}": path.read_bytes() for path in folder.iterdir()}
    server.content = archive(files)
    source, root = cifar100(server), tmp_path / "new" / "root"
    for _ in range(2):
        ensure_files(source, root, BOTH, download=True)
    assert len(server.asked) == 1
    assert {name: (root / name).read_bytes() for name in files} == files
    assert not list(root.glob(".unpack*"))
    assert len(source.read(root, BOTH, partial=True)["train"]) == 23


def test_files_that_are_there_stay(tmp_path, server):
    server.content = archive({"cifar-100-binary/train.bin": b"theirs", "cifar-100-binary/test.bin": b"t"})
    mine = tmp_path / "cifar-100-binary" / "train.bin"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    ensure_files(cifar100(server), tmp_path, BOTH, download=True)
    assert mine.read_bytes() == b"mine"
    assert (mine.parent / "test.bin").read_bytes() == b"t"


def test_nothing_is_unpacked_outside(tmp_path, server):
    root = tmp_path / "root"
    server.content = archive({"../outside": b"x", "cifar-100-binary/train.bin": b"y"})
    with pytest.raises(DataFileError, match="download failed"):
        ensure_files(cifar100(server), root, BOTH, download=True)
    assert names(tmp_path) == ["root"]


def test_an_archive_without_the_files(tmp_path, server):
    server.content = archive({"readme": b"x"})
    with pytest.raises(DataFileError, match=r"but without cifar-100-binary/\{train\.bin,test\.bin\} or"):
        ensure_files(cifar100(server), tmp_path, BOTH, download=True)


def test_without_files_and_not_allowed_to_download(tmp_path):
    with pytest.raises(DataFileError) as caught:
        ensure_files(CIFAR10_FILES, tmp_path, BOTH, download=False)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        f"CIFAR-10 files not found in {tmp_path}",
        "cifar-10-batches-bin/{data_batch_1.bin,data_batch_2.bin,",
        "cifar-10-batches-py/{data_batch_1,",
        "data.download=true",
        "data=digits",
    ):
        assert part in message
    assert not list(tmp_path.iterdir())


def test_the_folder_of_the_files_themselves(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        (folder / name).touch()
    with pytest.raises(DataFileError, match=f"; they are one folder up, so set data.root={tmp_path}$"):
        ensure_files(CIFAR10_FILES, folder, BOTH, download=True)


def test_an_archive_that_is_still_packed_is_named(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").touch()
    with pytest.raises(DataFileError, match=r"; unpack cifar-10-python\.tar\.gz there \(tar -xzf "):
        ensure_files(CIFAR10_FILES, tmp_path, BOTH, download=False)


def closed_port(server):
    return replace(
        SVHN_FILES,
        files={
            split: replace(item, url=f"http://127.0.0.1:{server.server_port}/{item.name}")
            for split, item in SVHN_FILES.files.items()
        },
    )


def test_without_files_and_offline(tmp_path, server):
    source = closed_port(server)
    server.socket.close()
    with pytest.raises(DataFileError) as caught:
        ensure_files(source, tmp_path, BOTH, download=True)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message.replace(str(tmp_path), "")) < 300
    for part in (
        f"SVHN files not found in {tmp_path}",
        "train_32x32.mat or svhn/train_32x32.mat and test_32x32.mat or svhn/test_32x32.mat",
        "download failed (no connection to 127.0.0.1)",
        "data=digits needs no files",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"status": 404}, "HTTP status 404"), ({"cut": 10, "cuts": 9}, "broke off"), ({}, "wrong checksum")],
)
def test_the_reason_is_short(tmp_path, server, change, reason):
    vars(server).update(change)
    with pytest.raises(DataFileError, match=rf"download failed \(.*{reason}.*\)"):
        ensure_files(closed_port(server), tmp_path, BOTH, download=True, retries=1)


def test_only_what_is_missing_is_downloaded(tmp_path, server):
    write_svhn(tmp_path / "train_32x32.mat", 20)
    write_svhn(tmp_path / "made.mat", 20, seed=1)
    server.content = (tmp_path / "made.mat").read_bytes()
    test = server.download(url=f"http://127.0.0.1:{server.server_port}/test_32x32.mat")
    source = replace(SVHN_FILES, files=SVHN_FILES.files | {"test": test})
    ensure_files(source, tmp_path, ("train",), download=True)
    assert server.asked == []
    ensure_files(source, tmp_path, BOTH, download=True)
    assert len(server.asked) == 1
    assert (tmp_path / "svhn" / "test_32x32.mat").read_bytes() == server.content


def test_the_data_module_downloads_in_prepare_data_only_if_told_to(tmp_path, server, monkeypatch):
    write_svhn(tmp_path / "made.mat", 40)
    server.content = (tmp_path / "made.mat").read_bytes()
    item = server.download(url=f"http://127.0.0.1:{server.server_port}/train_32x32.mat")
    monkeypatch.setitem(SVHN_FILES.files, "train", item)
    root = tmp_path / "root"
    with pytest.raises(DataFileError, match=r"data\.download=true"):
        svhn(root, test_from_train=10).prepare_data()
    data = svhn(root, test_from_train=10, download=True)
    data.prepare_data()
    data.setup("fit")
    assert (len(data.split("train")), len(data.split("test"))) == (30, 10)


def test_official_sources():
    items = [CIFAR10_FILES.archive, CIFAR100_FILES.archive, *SVHN_FILES.files.values()]
    assert [item.name for item in items] == [
        "cifar-10-binary.tar.gz",
        "cifar-100-binary.tar.gz",
        "train_32x32.mat",
        "test_32x32.mat",
    ]
    assert all(re.fullmatch("md5:[0-9a-f]{32}", item.known_hash) for item in items)
