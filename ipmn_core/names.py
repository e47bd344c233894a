"""Names of centers, modalities, classes, models and arms: order and display name, once."""

import re

CENTERS = ("NYU", "MCF", "NU", "AHN", "MCA", "IU", "EMC")
MODALITIES = ("t1", "t2")
LABELS = ("no risk", "low risk", "high risk")
LABEL_NAMES = {False: LABELS, True: ("not high risk", "high risk")}  # by whether the task is binary
TASKS = ("multiclass", "binary")
MODELS = ("resnet34", "shufflenetv2", "mobilenetv2", "efficientnetb0", "densenet121")  # as table 2
ARMS = ("centralized", "fedavg", "fedprox_0.1", "fedprox_0.3", "local_only")  # as table 3; the last is ours


def class_names(task: str) -> tuple[str, ...]:
    """Names of the classes of a task, `multiclass` or `binary`, in the order of its labels."""
    return LABEL_NAMES[task == "binary"]


DISPLAY = {
    "resnet34": "ResNet-34",
    "shufflenetv2": "ShuffleNet-V2",
    "mobilenetv2": "MobileNet-V2",
    "efficientnetb0": "EfficientNet-B0",
    "densenet121": "DenseNet-121",
    "centralized": "Centralized",
    "fedavg": "FedAvg",
    "local_only": "Local only",
    "center_only": "Center only",
    "header_only": "Header only",
    "histogram_only": "Histogram only",
    "oracle": "Oracle",
    "guideline": "Guideline",
    "t1": "T1",
    "t2": "T2",
    "global": "Global",
}


def display_name(name: str) -> str:
    """Name of a model, method, modality or center as the paper prints it; an unknown name as it is."""
    return DISPLAY.get(name, re.sub(r"^fedprox_(.+)$", r"FedProx (μ=\1)", name))
