"""Random sheets and volumes: an answer or an error for people, and nothing is lost."""

import csv
import datetime
import gzip
import pickle
import re
import struct

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import first_release

from ipmn_core import cli, views
from ipmn_core.data import (
    ScanError,
    case_name,
    inspect,
    load_cubes,
    load_roi,
    read,
    scanner_facts,
    to_cube,
    volume_problems,
)
from ipmn_core.data.sheets import read_table
from ipmn_core.names import CENTERS
from ipmn_core.params import Preprocessing


@pytest.fixture(scope="module", autouse=True)
def floats_of_every_size():
    """Training, in an earlier test of this process, may have set tiny numbers to zero."""
    import torch

    torch.set_flush_denormal(False)


settings.register_profile(
    "fixed",  # the same examples on every machine
    derandomize=True,
    deadline=None,
    max_examples=40,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
fixed = settings.get_profile("fixed")

# Label sheets

NAMES = [
    *["nyu_1", "NYU_1", " nyu_1 ", "nyu_1.nii.gz", "nyu_1_0000", "CAD_3", "mca_05", "IU_2", "EMC_01_002"],
    *["northwestern_0001", "nyu_mca_7", "ucsf_1", "../nyu_1", "nyu_ß", "NYU_SS", "nyu_é", "nyu_é"],
    *["=cmd|nyu_1", "+nyu_1", "nyu_\u200b1", "nyu 1", ".nii.gz", "_0000", "NA", "İU_2", ""],
]
LABELS = [
    *[0, 1, 2, 0.0, 2.0, "1", " 2 ", "1.0", 3, -1, 1.5],
    *["high", "０", "", " ", "NA", "none", "#REF!", "=1+1"],
]
ANY_CELL = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.datetimes(datetime.datetime(1950, 1, 1), datetime.datetime(2050, 1, 1)),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12),
)
NAME_CELL = st.one_of(st.sampled_from(NAMES), st.sampled_from(NAMES), ANY_CELL)
LABEL_CELL = st.one_of(st.sampled_from(LABELS), st.sampled_from(LABELS), ANY_CELL)
ROWS = st.lists(st.tuples(NAME_CELL, LABEL_CELL), max_size=12)


def is_blank(cell):
    """By pandas's own list of what is missing, a second opinion."""
    words = {"", "na", "n/a", "#n/a", "#na", "<na>", "nan", "null", "none"}
    return pd.isna(cell) or str(cell).strip().casefold() in words


@fixed
@given(rows=ROWS)
def test_every_labelled_row_is_a_scan_or_named_in_a_problem(tmp_path_factory, rows):
    root = tmp_path_factory.mktemp("sheet")
    first_release(root, t1=rows)
    cohort, problems = inspect(root)
    scans = cohort.scans
    errors = problems[problems["severity"] == "error"]
    told = {
        int(number)
        for row in errors.itertuples()
        for text in re.findall(r"rows? ([\d and]+)", f"{row.where}: {row.problem}")
        for number in re.findall(r"\d+", text)
    }
    used = {case.casefold() for case in scans["case_id"]}
    for number, (name, label) in enumerate(rows, start=2):
        if not is_blank(label):
            own = "" if is_blank(name) else case_name(name).casefold()
            assert (number in told) != (own in used), (number, name, label)
    assert set(scans["label"]) <= {0, 1, 2} and set(scans["center"]) <= set(CENTERS)
    assert not scans["case_id"].str.casefold().duplicated().any()
    blank = sum(is_blank(label) for name, label in rows if not is_blank(name))
    assert scans.attrs["unlabelled"]["t1"] == blank


@fixed
@given(
    rows=st.lists(st.tuples(*[st.text(st.characters(codec="utf-8"), max_size=5)] * 2), max_size=4),
    separator=st.sampled_from(",;\t"),
)
def test_cells_of_a_csv_file_are_what_was_written(tmp_path_factory, rows, separator):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator, quoting=csv.QUOTE_ALL).writerows([("name", "risk"), *rows])
    written = [(n, row) for n, row in enumerate(rows, start=2) if any(cell.strip() for cell in row)]
    assert read_table(path, ("name", "risk"), []) == ("a.csv", ("name", "risk"), written, frozenset())


# Volumes

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=5)
DTYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "c8", "c16"]
DTYPES += [[("R", "u1"), ("G", "u1"), ("B", "u1")]]
NUMBERS = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, np.nan, np.inf, 1e-40, 1e38, -3e38]), st.floats(width=32)
)


@st.composite
def volumes(draw):
    """The bytes of a NIfTI file, some of its header's numbers at random."""
    shape, dtype = tuple(draw(SIZES)), np.dtype(draw(st.sampled_from(DTYPES)))
    if draw(st.integers(0, 3)):  # mostly
        shape = (4, 3, 2)
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    noise = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, n_bytes, np.uint8)
    data = np.frombuffer(noise.tobytes(), dtype).reshape(shape)
    if draw(st.booleans()) and not dtype.names:
        data = (data.view() * 0 + draw(st.integers(0, 2))).astype(dtype)
        data.flat[0] = draw(st.integers(0, 2))
    with np.errstate(all="ignore"):
        raw = bytearray(nib.Nifti1Image(data, np.diag([1.4, 1.2, 3, 1]), dtype=dtype).to_bytes())
    # places in the header: dim, pixdim, scaling, codes of qform and sform, sform
    places = [(40, "8h"), (76, "8f"), (112, "2f"), (252, "2h"), (280, "12f")]
    for start, layout in draw(st.sets(st.sampled_from(places), max_size=1)):
        number = NUMBERS if layout.endswith("f") else st.integers(-2, 32767)
        n = int(layout[:-1])
        raw[start : start + struct.calcsize("<" + layout)] = struct.pack(
            "<" + layout, *draw(st.lists(number, min_size=n, max_size=n))
        )
    return bytes(raw)


MASK = np.zeros((4, 3, 2), np.uint8)
MASK[1:4, 1:, :] = 1
MASK = nib.Nifti1Image(MASK, np.diag([1.4, 1.2, 3, 1])).to_bytes()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(fixed, max_examples=80)
@given(image=volumes(), mask=st.one_of(st.none(), st.just(MASK), volumes()))
def test_a_volume_gives_a_cube_in_0_to_1_or_an_error_of_the_package(tmp_path_factory, image, mask):
    folder = tmp_path_factory.mktemp("volumes")
    (folder / "i.nii.gz").write_bytes(gzip.compress(image, 1))
    if mask:
        (folder / "m.nii.gz").write_bytes(gzip.compress(mask, 1))
    files = {"image": str(folder / "i.nii.gz"), "mask": str(folder / "m.nii.gz") if mask else ""}
    row = files | {"case_id": "AHN01", "center": "AHN"}
    severities = [severity for severity, _, _, remedy in volume_problems(pd.DataFrame([row])) if remedy]
    try:
        roi = load_roi(row["image"], row["mask"], row["case_id"])
    except ScanError as error:
        assert str(error).startswith("AHN01: ") and str(folder) in str(error)
        assert severities == ["error"]
        return
    assert "error" not in severities
    assert 0 < np.prod(roi.header.get_zooms()) < np.inf or "warning" in severities
    for how in (Preprocessing(8), Preprocessing(8, 2.0, "zscore", "canonical")):
        try:
            roi = load_roi(row["image"], row["mask"], row["case_id"], how)
        except ScanError as error:  # of some settings alone
            assert str(error).startswith("AHN01: ")
            continue
        cube = to_cube(np.asanyarray(roi.dataobj), 8, how.intensity)
        assert np.isfinite(cube).all() and (how.spacing or (cube.min() >= 0 and cube.max() <= 1))
        assert nib.as_closest_canonical(roi).shape


@settings(fixed, max_examples=80)
@given(data=st.data())
def test_a_file_with_a_byte_changed_or_cut_off_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damage") / "i.nii.gz"
    noise = np.random.default_rng(0).integers(0, 99, (6, 5, 4)).astype(np.int16)
    raw = bytearray(nib.Nifti1Image(noise, np.diag([1.4, 1.2, 3, 1])).to_bytes())
    if packed := data.draw(st.booleans()):
        raw = bytearray(gzip.compress(raw))
    end = data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw[:end] if packed else gzip.compress(raw[:end]))
    try:
        voxels = np.asanyarray(load_roi(path, None, "AHN01").dataobj)
    except ScanError as error:
        assert str(error).startswith(f"AHN01: {path} ")
        return
    if packed and place >= 10:  # beyond gzip's own header, whose time and name are not summed
        assert np.array_equal(voxels, noise)


def with_secret(image):
    """Bytes of a file whose header holds text wherever it can."""
    for field in ("descrip", "aux_file", "intent_name", "db_name", "data_type"):
        image.header[field] = b"DOE^JANE"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE^JANE"))
    raw = image.to_bytes()
    assert raw.count(b"DOE^JANE") == 6
    return raw


def test_text_of_a_header_is_in_no_message_no_warning_no_file_and_no_image(tmp_path, capfd, caplog):
    root, affine = tmp_path / "cohort", np.diag([-1.0, -1, 1, 1])  # so that there is a warning, too
    first_release(root, t1=[("nyu_1", 0), ("nyu_2", 1), ("nyu_3", 2)])
    noise = np.random.default_rng(0).random((6, 5, 4), np.float32)
    whole = with_secret(nib.Nifti1Image(noise, affine))
    sick = with_secret(nib.Nifti1Image(noise * np.nan, affine))
    for name, raw in (("nyu_1", whole), ("nyu_2", whole[:-40]), ("nyu_3", sick)):
        (root / "t1_clean_ROI" / f"{name}.nii.gz").write_bytes(gzip.compress(raw))
    assert cli.main(["check", str(root)]) == 1
    scans = read(root).scans
    for case in ("nyu_2", "nyu_3"):
        with pytest.raises(ScanError) as error:
            load_cubes(scans[scans["case_id"] == case], Preprocessing(32), tmp_path / "out")
        assert "DOE" not in str(error.value)
    with pytest.warns(UserWarning) as told:
        load_cubes(scans.head(1), Preprocessing(32), tmp_path / "out")
    scanner_facts(scans.head(1)).to_csv(tmp_path / "out" / "facts.csv")
    image, _, roi = views.scan_volumes(scans.iloc[0])
    nib.save(roi, tmp_path / "out" / "roi.nii")
    views.show_slice(plt.subplots()[1], image, 1).figure.savefig(tmp_path / "out" / "figure.svg")
    plt.close("all")
    written = [path.read_bytes() for path in (tmp_path / "out").iterdir()]
    said = "".join([*capfd.readouterr(), caplog.text, *(str(w.message) for w in told)])
    assert len(written) == 4 and "spacing unknown" in said
    assert "DOE" not in said and not any(b"DOE" in content for content in written)
    assert b"DOE" not in pickle.dumps((image, roi))
