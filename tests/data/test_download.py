"""Fetching and unpacking archives: all or nothing."""

import hashlib
import io
import tarfile
import threading
import zipfile
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
import torchvision.datasets.utils as tv
from pictures import refusal

from datasets.download import provide, without_downloads
from utils.errors import UserError


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


def test_fetches_and_unpacks_once(tmp_path, published):
    root = tmp_path / "data" / "deep"
    assert (fetch(root, published) / "ä.txt").read_text() == "content"
    published.file.unlink()
    assert fetch(root, published) == root / "set"
    assert sorted(entry.name for entry in root.iterdir()) == ["set", "set.zip"]


def test_half_an_archive_leaves_nothing_behind(tmp_path, published, monkeypatch):
    root, fetch_url = tmp_path / "data", tv._urlretrieve

    def break_off(url, filename, *more):
        fetch_url(url, filename, *more)
        with open(filename, "r+b") as file:
            file.truncate(10)

    monkeypatch.setattr(tv, "_urlretrieve", break_off)
    line = refusal(fetch, root, published)
    assert "cannot be downloaded (File not found or corrupted.); put set.zip or the folder set in" in line
    assert not root.exists()
    monkeypatch.undo()
    assert fetch(root, published).is_dir()


def test_a_folder_that_a_file_names_is_not_written_to(tmp_path, published):
    with without_downloads():
        assert "which a file names, holds no set" in refusal(fetch, tmp_path / "data", published)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_nothing_lands_outside(tmp_path, kind):
    root, name = tmp_path / "data", "../outside.txt"
    root.mkdir()
    if kind == "zip":
        with zipfile.ZipFile(root / "set.zip", "w") as content:
            content.writestr("set/fine.txt", "content")
            content.writestr(name, "content")
    else:
        with tarfile.open(root / "set.tar.gz", "w:gz") as content:
            for member in ("set/fine.txt", name):
                content.addfile(tarfile.TarInfo(member), io.BytesIO())
    with suppress(UserError):  # where the format allows it, such a member is passed over
        provide(root, "set", f"http://none/set.{kind}", "")
    assert {entry.name for entry in root.rglob("*")} <= {f"set.{kind}", "set", "fine.txt"}
    assert not (tmp_path / "outside.txt").exists()


@pytest.mark.parametrize("name", ["set.zip", "set.tar.gz"])
def test_a_damaged_archive_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"half an archive")
    assert "delete it and run again" in refusal(provide, tmp_path, "set", f"http://none/{name}", "")
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
