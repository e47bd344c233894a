import pytest
from hospitals import RUN, SITES, largest_difference, profile

from ipmn_core import models
from ipmn_core.flower.site import Site, introduce, train


@pytest.fixture
def at(nodes):
    """Opens NYU's site, of 6 cases to train and 6 to test."""

    def opened(token="a_run", **changes):
        p = profile("/the/servers/own", data="/the/servers/data")
        order = {"profile": p.model_dump_json(), "run": RUN, "token": token, "sites": list(SITES)}
        return Site(nodes["NYU"] | changes, order)

    return opened


def states(site):
    return sorted(path.name for path in site.folder.glob("learner_*"))


@pytest.mark.parametrize("token", ["../elsewhere", "/etc", "", "..", "a\n"])
def test_a_token_that_is_a_path_is_refused(at, token):
    with pytest.raises(ValueError, match="token"):
        at(token)


def test_the_folders_are_the_sites_own_as_seen_from_where_it_was_started(at, nodes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    site = at(outputs="kept")
    assert (site.p.data, site.p.outputs) == (nodes["NYU"]["data"], str(tmp_path / "kept"))
    assert site.folder == tmp_path / "kept" / "a_run" and site.p.rounds == 2


def test_what_leaves_is_ordered_and_fingerprinted_anew_for_each_run(at):
    assert list(at().order) == list(at().order) and introduce(at()) == introduce(at())
    others = [at(f"run_{k}") for k in range(7)]
    assert len({tuple(other.order) for other in others}) > 1  # seven of 6! orders alike: 7e-18
    assert len({introduce(other)["data"] for other in others}) == 7


def test_a_round_asked_for_again_ends_with_the_same_bits(at):
    _, one = train(at(), models.build("tiny", 2, seed=0).state_dict(), 1, 0, 0, False)
    (loss, two), (again, same) = (train(at(), one, 2, 0, 1, False) for _ in range(2))
    assert loss == again and largest_difference(two, same) == 0 < largest_difference(two, one)
    assert states(at()) == ["learner_1.pt", "learner_2.pt"]
    train(at(), two, 3, 0, 2, False)
    assert states(at()) == ["learner_2.pt", "learner_3.pt"]  # no round can ask for the first again
    with pytest.raises(FileNotFoundError, match=r"learner_1\.pt"):
        train(at(), two, 4, 0, 1, False)
