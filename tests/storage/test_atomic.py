import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from perennial.errors import PerennialError
from perennial.storage import atomic


def write_pair(content):
    def write(folder):
        (folder / "weights.bin").write_bytes(content)
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text("{}")

    return write


def everything(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_a_committed_folder_holds_what_was_written_and_a_manifest_of_it(tmp_path):
    atomic.commit_folder(tmp_path / "deep" / "one", write_pair(b"abc"))
    atomic.verify(tmp_path / "deep" / "one")
    assert set(everything(tmp_path)) == {
        "deep/one/weights.bin",
        "deep/one/adapter/adapter_config.json",
        "deep/one/manifest.json",
    }
    # The SHA-256 of "abc" is the first example of FIPS 180-4.
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert f'"sha256": "{digest}"' in (tmp_path / "deep" / "one" / "manifest.json").read_text()


@pytest.mark.parametrize("name", ["weights.bin", "adapter/adapter_config.json"])
def test_a_flipped_byte_is_found_and_the_file_named(tmp_path, name):
    atomic.commit_folder(tmp_path / "one", write_pair(bytes(1000)))
    path = tmp_path / "one" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(PerennialError, match=rf"{name} is damaged: its SHA-256"):
        atomic.verify(tmp_path / "one")


def test_a_truncated_a_missing_and_an_unlisted_file(tmp_path):
    atomic.commit_folder(tmp_path / "one", write_pair(bytes(1000)))
    (tmp_path / "one" / "notes.txt").write_text("mine")
    atomic.verify(tmp_path / "one")
    os.truncate(tmp_path / "one" / "weights.bin", 10)
    with pytest.raises(PerennialError, match=r"weights\.bin is damaged: 10 bytes where 1000 were written"):
        atomic.verify(tmp_path / "one")
    (tmp_path / "one" / "weights.bin").unlink()
    with pytest.raises(PerennialError, match=r"weights\.bin is missing"):
        atomic.verify(tmp_path / "one")


@pytest.mark.parametrize("manifest", [None, b"", b"[]", b'{"files": 3}', b'{"files": {"a": {}}}', b"\xff\xfe"])
def test_a_folder_without_a_valid_manifest_is_no_commit(tmp_path, manifest):
    atomic.commit_folder(tmp_path / "one", write_pair(b"abc"))
    path = tmp_path / "one" / "manifest.json"
    path.unlink() if manifest is None else path.write_bytes(manifest)
    with pytest.raises(PerennialError, match=r"manifest\.json"):
        atomic.verify(tmp_path / "one")


CHILD = """
import sys
from pathlib import Path
from perennial.storage import atomic
def write(folder):
    (folder / "weights.bin").write_bytes(b"new")
atomic.commit_folder(Path(sys.argv[1]), write)
"""


@pytest.mark.parametrize("where", ["save", "rename"])
def test_a_process_killed_while_it_replaces_a_folder_leaves_the_former_one(tmp_path, where):
    atomic.commit_folder(tmp_path / "one", write_pair(b"old"))
    before = everything(tmp_path)
    environment = {**os.environ, "PERENNIAL_KILL_AT": where}
    child = subprocess.run([sys.executable, "-c", CHILD, tmp_path / "one"], env=environment, check=False)
    assert child.returncode == -9
    assert everything(tmp_path) != before, "the kill came too early to mean anything"
    atomic.verify(tmp_path / "one")
    atomic.clean(tmp_path)
    assert everything(tmp_path) == before


def test_a_folder_moved_aside_to_be_replaced_comes_back_if_the_replacement_never_came(tmp_path):
    atomic.commit_folder(tmp_path / "one", write_pair(b"old"))
    (tmp_path / "one").rename(tmp_path / ".one.former.123.partial")
    atomic.clean(tmp_path)
    assert (tmp_path / "one" / "weights.bin").read_bytes() == b"old"


def test_a_replaced_folder_is_wholly_the_new_one(tmp_path):
    atomic.commit_folder(tmp_path / "one", write_pair(b"old"))
    atomic.commit_folder(tmp_path / "one", lambda folder: (folder / "other.bin").write_bytes(b"new"))
    atomic.verify(tmp_path / "one")
    assert set(everything(tmp_path)) == {"one/other.bin", "one/manifest.json"}


def test_what_a_killed_process_of_the_same_number_left_does_not_get_into_the_commit(tmp_path):
    leftover = tmp_path / f".one.new.{os.getpid()}.partial"
    leftover.mkdir()
    (leftover / "stale.bin").write_bytes(b"stale")
    atomic.commit_folder(tmp_path / "one", write_pair(b"new"))
    assert not (tmp_path / "one" / "stale.bin").exists()
    atomic.verify(tmp_path / "one")


def test_clean_leaves_files_of_others_alone(tmp_path):
    (tmp_path / ".notes.partial").write_text("mine")
    (tmp_path / ".half.json.new.77.partial").write_text("half")
    atomic.clean(tmp_path)
    assert set(everything(tmp_path)) == {".notes.partial"}


def fail_at(monkeypatch, name, count, code):
    """Make the `count`-th call of `os.<name>` fail; returns the list of calls made."""
    real, calls = getattr(os, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == count:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)
    return calls


def test_wherever_the_disk_fills_up_the_folder_is_the_former_or_the_new_one_and_whole(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        calls = fail_at(patch, "fsync", 0, errno.ENOSPC)
        atomic.commit_folder(tmp_path / "probe", write_pair(b"new"))
    assert len(calls) >= 5, "three files and two folders must reach the disk"
    for count in range(1, len(calls) + 1):
        target = tmp_path / f"run{count}" / "one"
        atomic.commit_folder(target, write_pair(b"old"))
        with monkeypatch.context() as patch:
            fail_at(patch, "fsync", count, errno.ENOSPC)
            with pytest.raises(PerennialError, match=rf"disk is full, so {target} could not be written; free some"):
                atomic.commit_folder(target, write_pair(b"new"))
        atomic.clean(target.parent)
        atomic.verify(target)
        last = count == len(calls)  # flushing the parent comes after the rename
        assert (target / "weights.bin").read_bytes() == (b"new" if last else b"old")
        assert [child.name for child in target.parent.iterdir()] == ["one"]


def test_a_really_full_device_while_tensors_are_saved(tmp_path):
    def write(folder):
        (folder / "weights.bin").symlink_to("/dev/full")
        (folder / "weights.bin").write_bytes(bytes(10**5))

    atomic.commit_folder(tmp_path / "one", write_pair(b"old"))
    with pytest.raises(PerennialError, match="The disk is full"):
        atomic.commit_folder(tmp_path / "one", write)
    atomic.verify(tmp_path / "one")
    assert list(tmp_path.iterdir()) == [tmp_path / "one"]


def test_a_full_disk_met_inside_safetensors_is_recognised(tmp_path):
    from safetensors import SafetensorError

    def write(folder):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(PerennialError, match="The disk is full"):
        atomic.commit_folder(tmp_path / "one", write)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("code", "words"), [(errno.EROFS, "Read-only file system"), (errno.EACCES, "Permission")])
def test_a_read_only_folder(tmp_path, monkeypatch, code, words):
    with monkeypatch.context() as patch:
        fail_at(patch, "mkdir", 1, code)
        with pytest.raises(PerennialError, match=rf"one cannot be written \({words}.*make its folder writable"):
            atomic.commit_folder(tmp_path / "one", write_pair(b"abc"))


def test_a_failed_file_write_leaves_the_former_file_and_no_litter(tmp_path, monkeypatch):
    atomic.write_json(tmp_path / "a.json", {"x": 1})
    with monkeypatch.context() as patch:
        fail_at(patch, "fsync", 1, errno.ENOSPC)
        with pytest.raises(PerennialError, match=r"a\.json could not be written"):
            atomic.write_json(tmp_path / "a.json", {"x": 2})
    assert everything(tmp_path) == {"a.json": b'{\n  "x": 1\n}\n'}


def test_a_file_in_the_place_of_a_folder(tmp_path):
    Path(tmp_path / "file").write_text("mine")
    with pytest.raises(PerennialError, match=r"file/a\.json could not be written"):
        atomic.write_text(tmp_path / "file" / "a.json", "x")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_error_of_the_caller_passes_through_and_leaves_nothing(tmp_path):
    def write(folder):
        (folder / "weights.bin").write_bytes(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        atomic.commit_folder(tmp_path / "one", write)
    assert list(tmp_path.iterdir()) == []
