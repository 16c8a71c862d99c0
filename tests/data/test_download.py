"""Fetching and unpacking archives: all or nothing."""

import urllib.request
import zipfile

import pytest
from pictures import refusal

from datasets.download import Archive


@pytest.fixture
def published(tmp_path):
    """An archive on a "server"."""
    path = tmp_path / "server" / "set.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as content:
        content.writestr("set/ä.txt", "content")
    return path


def test_fetches_and_unpacks_once(tmp_path, published):
    archive = Archive(published.as_uri(), "set")
    root = tmp_path / "data" / "deep"
    assert (archive.provide(root) / "ä.txt").read_text() == "content"
    published.unlink()
    assert archive.provide(root) == root / "set"
    assert sorted(entry.name for entry in root.iterdir()) == ["set", "set.zip"]


def test_an_interrupted_download_leaves_nothing_behind(tmp_path, published, monkeypatch):
    archive, root = Archive(published.as_uri(), "set"), tmp_path / "data"
    real = urllib.request.urlopen

    def break_off(*args, **kwargs):
        response = real(*args, **kwargs)
        response.read(10)  # lost on the way
        return response

    monkeypatch.setattr(urllib.request, "urlopen", break_off)
    assert "the connection broke off" in refusal(archive.provide, root)
    assert list(root.iterdir()) == []
    monkeypatch.undo()
    assert archive.provide(root).is_dir()


def test_a_wrong_checksum_is_refused(tmp_path, published):
    archive = Archive(published.as_uri(), "set", md5="0" * 32)
    assert "the checksum is wrong" in refusal(archive.provide, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt"])
def test_an_archive_that_reaches_outside_is_refused(tmp_path, name):
    (tmp_path / "data").mkdir()
    with zipfile.ZipFile(tmp_path / "data" / "set.zip", "w") as content:
        content.writestr("set/fine.txt", "content")
        content.writestr(name, "content")
    assert "would land outside" in refusal(Archive("http://none/set.zip", "set").provide, tmp_path / "data")
    assert [entry.name for entry in (tmp_path / "data").iterdir()] == ["set.zip"]
    assert not (tmp_path / "outside.txt").exists()


@pytest.mark.parametrize("name", ["set.zip", "set.tar.gz"])
def test_a_damaged_archive_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"half an archive")
    assert "delete it and run again" in refusal(Archive(f"http://none/{name}", "set").provide, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
