import pytest

from ipmn_core import phantom


@pytest.fixture(scope="session")
def first_root(tmp_path_factory):
    """A phantom cohort in the first release's layout, one case per center and class; not to be changed."""
    folder = tmp_path_factory.mktemp("first") / "cohort"
    return phantom.write(folder, layout="first", max_per_cell=1, progress=False)
