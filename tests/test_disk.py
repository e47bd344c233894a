import errno
import os

import pytest

from ipmn_core.disk import atomic


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic(path) as tmp:
        tmp.write_text("new")
        assert path.read_text() == "old" and tmp.parent == path.parent
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (RuntimeError("unexpected pos 64 vs 0"), "is the disk full? unexpected pos"),
    ],
    ids=["the system's", "torch's"],
)
def test_a_full_disk_is_named_with_the_file_and_the_remedy_and_the_old_file_stays(tmp_path, error, reason):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="free disk space, or choose another") as told, atomic(path) as tmp:
        tmp.write_text("half")
        raise error
    assert f"{path} cannot be written ({reason}" in str(told.value)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_any_other_error_is_raised_unchanged(tmp_path):
    with pytest.raises(TypeError, match=r"^no tensor$"), atomic(tmp_path / "a.pt") as tmp:
        tmp.write_text("half")
        raise TypeError("no tensor")
    assert os.listdir(tmp_path) == []
