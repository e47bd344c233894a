import errno
import os
import subprocess
import sys

import pytest

from ipmn_core import disk


def test_a_file_has_its_new_content_and_nothing_lies_beside_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    assert disk.write(path, lambda tmp: tmp.write_text("new")) == path
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_until_it_is_whole_the_old_one_stands(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def look(tmp):
        tmp.write_text("half")
        assert path.read_text() == "old" and tmp.parent == path.parent

    disk.write(path, look)
    assert path.read_text() == "half"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (RuntimeError("unexpected pos 64 vs 0"), "no room on the disk? unexpected pos"),
    ],
    ids=["the system's", "torch's"],
)
def test_a_full_disk_is_named_with_the_file_and_the_remedy_and_leaves_the_old(tmp_path, error, reason):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fill(tmp):
        tmp.write_text("half")
        raise error

    with pytest.raises(OSError, match="make room, or choose another folder") as told:
        disk.write(path, fill)
    assert f"{path} cannot be written ({reason}" in str(told.value)
    assert told.value.__cause__ is error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_any_other_error_comes_out_as_it_is(tmp_path):
    def fail(tmp):
        tmp.write_text("half")
        raise TypeError("no tensor")

    with pytest.raises(TypeError, match=r"^no tensor$"):
        disk.write(tmp_path / "a.pt", fail)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match=r"missing/a\.txt cannot be written \(No such file or directory\)"):
        disk.write(tmp_path / "missing" / "a.txt", lambda tmp: tmp.write_text("new"))


@pytest.mark.skipif(os.name != "posix", reason="elsewhere nothing is swept: asking for a process may end it")
def test_what_the_dead_left_half_is_swept_and_what_the_living_write_stays(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "runs" / f".phantom.{dead.pid}.partial").mkdir(parents=True)
    (tmp_path / "runs" / f".model.pt.{dead.pid}.partial").write_text("half")
    (tmp_path / f".a.{os.getpid()}.partial").write_text("mine")
    (tmp_path / "b.partial").write_text("a download, which goes on")
    disk.sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [f".a.{os.getpid()}.partial", "b.partial", "runs"]
    assert os.listdir(tmp_path / "runs") == []
