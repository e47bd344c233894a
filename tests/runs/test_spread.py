import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time

import pytest

from ipmn_core.runs import spread

on_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="processes are forked, and end with their parent"
)


def finish(path):
    path.write_text(f"{os.getpid()}")


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def leave():
    os._exit(3)


def fail():
    raise ValueError("no such case")


def nothing_done():
    return 0.0


def test_runs_that_fail_are_named_with_their_reason_and_the_others_are_finished(tmp_path):
    calls = [
        ("t1 fold 0", finish, (tmp_path / "a",)),
        ("t1 fold 1", be_killed, ()),
        ("t1 fold 2", leave, ()),
        ("t2 fold 0", fail, ()),
        ("t2 fold 1", finish, (tmp_path / "b",)),
    ]
    with pytest.raises(spread.RunsFailedError, match="3 of 5 runs failed; the others are finished") as error:
        spread.over_workers(calls, 2, "loky", nothing_done, "training")
    assert str(error.value).splitlines()[1:] == [
        "  t1 fold 1: its process was ended by SIGKILL (out of memory?)",
        "  t1 fold 2: its process ended with status 3",
        "  t2 fold 0: ValueError: no such case",
    ]
    assert (tmp_path / "a").exists() and (tmp_path / "b").exists()


def test_with_several_workers_every_run_has_a_process_of_its_own(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    spread.over_workers([(path.name, finish, (path,)) for path in paths], 2, "loky", nothing_done, "training")
    assert len({os.getpid(), *(int(path.read_text()) for path in paths)}) == 4


def test_with_one_worker_runs_are_in_this_process_and_their_error_comes_out(tmp_path):
    calls = [("a", finish, (tmp_path / "a",)), ("b", fail, ()), ("c", finish, (tmp_path / "c",))]
    with pytest.raises(ValueError, match=r"^no such case$"):
        spread.over_workers(calls, 1, "loky", nothing_done, "training")
    assert (tmp_path / "a").read_text() == f"{os.getpid()}"
    assert not (tmp_path / "c").exists()


def test_progress_goes_from_none_to_all(capsys):
    done = []
    calls = [(f"{k}", done.append, (k,)) for k in range(3)]
    spread.over_workers(calls, 1, "loky", lambda: len(done), "training binary")
    first, *_, last = re.findall("training binary: .*?]", capsys.readouterr().err)
    assert re.search(r"  0%\|.*\| 0\.0/3 runs \[00:00<\?\]", first)
    assert re.search(r"100%\|.*\| 3\.0/3 runs \[00:0\d<00:00\]", last)


def test_a_backend_that_is_not_installed_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(spread.RunsFailedError, match=r"ray is not installed; `pip install 'ipmn\[ray\]'`"):
        spread.over_workers([("a", finish, ()), ("b", finish, ())], 2, "ray", nothing_done, "training")


def test_without_runs_no_progress_is_shown(capsys):
    spread.over_workers([], 2, "loky", nothing_done, "training binary")
    assert capsys.readouterr().err == ""


def test_the_time_left_follows_from_the_time_it_took(capsys):
    started = time.monotonic()
    done = lambda: 0.1 if time.monotonic() - started > 1.5 else 0.0  # noqa: E731
    spread.over_workers([("a", time.sleep, (2.3,))], 1, "loky", done, "training")
    times = re.findall(r" 10%.*?\[00:(\d\d)<00:(\d\d)\]", capsys.readouterr().err)
    assert times and all(int(left) >= 9 * int(elapsed) for elapsed, left in times)  # both are rounded down


def test_the_bar_is_renewed_every_second_and_what_was_done_before_is_not_its_pace(capsys):
    started = time.monotonic()
    done = lambda: 1 + 0.05 * int(time.monotonic() - started)  # noqa: E731
    spread.over_workers([("a", time.sleep, (3.5,)), ("b", int, ())], 1, "loky", done, "training")
    left = dict(re.findall(r"runs \[00:0(\d)<00:(\d\d)\]", capsys.readouterr().err))
    assert {"1", "2", "3"} <= set(left)
    assert all(int(seconds) >= 10 for seconds in left.values())  # 0.8 to 0.95 runs, 0.05 a second


def hold(count, pipe):
    with spread.own_gpu(count) as gpu:
        pipe.send(gpu)
        pipe.recv()


def holder_of_one(count):
    """A process that holds a GPU until it is killed, and the number of that GPU."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(count, there), daemon=True)
    process.start()
    return process, here.recv()


@on_linux
def test_every_process_has_a_gpu_of_its_own_until_all_are_held(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (one, first), (two, second) = holder_of_one(2), holder_of_one(2)
    assert {first, second} == {0, 1}
    with spread.own_gpu(2) as shared:
        assert shared in (0, 1)
    for process, freed in ((one, first), (two, second)):
        process.kill()
        process.join()
        with spread.own_gpu(2) as gpu:
            assert gpu == freed or process is two  # then both are free


@on_linux
def test_an_error_of_the_run_that_holds_a_gpu_comes_out(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(BlockingIOError, match="no more processes"), spread.own_gpu(2):
        raise BlockingIOError("no more processes")


def go_on(pipe):
    pipe.send("begun")
    time.sleep(30)


@on_linux
@pytest.mark.parametrize("start", [spread.FORK, spread.CLEAN])
def test_a_run_ends_with_the_worker_that_waits_for_it(start):
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=spread.alone, args=(go_on, (sender,), start))
    worker.start()
    sender.close()
    assert receiver.poll(300) and receiver.recv() == "begun"  # seconds
    worker.kill()
    assert receiver.poll(10)  # seconds
    with pytest.raises(EOFError):  # nobody holds the other end any more
        receiver.recv()
