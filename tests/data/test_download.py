"""Fetching and unpacking archives: all or nothing."""

import hashlib
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
import torchvision.datasets.utils as tv
from refusals import refusal

from datasets.download import provide, without_downloads


class Published(NamedTuple):
    file: Path
    url: str
    md5: str


@pytest.fixture
def published(tmp_path):
    """An archive on a server."""
    path = tmp_path / "server" / "set.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as content:
        content.writestr("set/ä.txt", "content")
    serve = partial(SimpleHTTPRequestHandler, directory=path.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/set.zip"
        yield Published(path, url, hashlib.md5(path.read_bytes()).hexdigest())
        server.shutdown()


def fetch(root, published):
    return provide(root, "set", published.url, published.md5)


@pytest.mark.parametrize("there", [False, True])
def test_fetches_and_unpacks_once_what_is_not_there(tmp_path, published, there):
    root = tmp_path / "data" / "deep"
    if there:
        root.mkdir(parents=True)
        published.file.rename(root / "set.zip")
    assert (fetch(root, published) / "ä.txt").read_text() == "content"
    published.file.unlink(missing_ok=True)
    assert fetch(root, published) == root / "set"
    assert sorted(entry.name for entry in root.iterdir()) == ["set", "set.zip"]


def test_a_broken_archive_of_the_users_is_named_and_kept(tmp_path, published):
    (tmp_path / "set.zip").write_bytes(b"half an archive")
    assert "set.zip cannot be unpacked" in refusal(fetch, tmp_path, published)
    assert (tmp_path / "set.zip").read_bytes() == b"half an archive"


def test_half_an_archive_leaves_nothing_behind(tmp_path, published, monkeypatch):
    root, fetch_url = tmp_path / "data", tv._urlretrieve

    def break_off(url, filename, *more):
        fetch_url(url, filename, *more)
        with open(filename, "r+b") as file:
            file.truncate(10)

    monkeypatch.setattr(tv, "_urlretrieve", break_off)
    line = refusal(fetch, root, published)
    assert "(File not found or corrupted.); put set.zip or the folder set in" in line
    assert not root.exists()
    monkeypatch.undo()
    assert fetch(root, published).is_dir()


def test_a_folder_that_a_file_names_is_not_written_to(tmp_path, published):
    with without_downloads():
        assert "which a file names, holds no set" in refusal(fetch, tmp_path / "data", published)
    assert not (tmp_path / "data").exists()
