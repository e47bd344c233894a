"""Random volumes with a mask, saved as NIfTI files."""

import nibabel as nib
import numpy as np

AFFINE = np.array([[-1.4, 0, 0, 90], [0, 1.2, 0, -60], [0, 0.1, 6.0, 30], [0, 0, 0, 1]], float)
LOST = np.diag([-1.0, -1, 1, 1])  # as in the data set's AHN05


def volume(seed=0, shape=(24, 20, 8)):
    """An image and a mask that leaves a margin on every side."""
    rng = np.random.default_rng(seed)
    image, mask = rng.gamma(2, 100, shape).astype(np.float32), np.zeros(shape, np.uint8)
    mask[5:17, 4:15, 2:7] = rng.random((12, 11, 5)) < 0.6
    return image, mask


def save(folder, name, data, affine=AFFINE):
    path = folder / f"{name}.nii.gz"
    nib.save(nib.Nifti1Image(data, affine), path)
    return str(path)


def voxels(image):
    return np.asanyarray(image.dataobj)
