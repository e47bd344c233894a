"""Names of the paper's centers and classes, of models and arms: their order and display names.

Only code that reads the paper's data set, writes the phantom or shows the paper's numbers may use CENTERS,
MODALITIES and LABELS; all other code takes centers, modalities and classes from the cohort.
"""

import re
from collections.abc import Sequence

CENTERS = ("NYU", "MCF", "NU", "AHN", "MCA", "IU", "EMC")
MODALITIES = ("t1", "t2")
LABELS = ("no risk", "low risk", "high risk")
TASKS = ("multiclass", "binary")  # all classes; the positive ones against the rest
MODELS = ("resnet34", "shufflenetv2", "mobilenetv2", "efficientnetb0", "densenet121")  # as in table 2
ARMS = ("centralized", "fedavg", "fedprox_0.1", "fedprox_0.3", "local_only")  # as in table 3; last: ours
# arms that train no network: probes, and two that use the phantom's truth
REFERENCES = ("center_only", "header_only", "histogram_only", "oracle", "guideline")

DISPLAY = {
    "resnet34": "ResNet-34",
    "resnet50": "ResNet-50",
    "shufflenetv2": "ShuffleNet-V2",
    "mobilenetv2": "MobileNet-V2",
    "efficientnetb0": "EfficientNet-B0",
    "densenet121": "DenseNet-121",
    "centralized": "Centralized",
    "fedavg": "FedAvg",
    "local_only": "Local only",
    "fedprox": "FedProx",
    "ditto": "Ditto",
    "fedbn": "FedBN",
    "fedavg_bn_local": "FedAvg, BN local",
    "fedavg_bn_recomputed": "FedAvg, BN recomputed",
    "fedadam": "FedAdam",
    "scaffold": "SCAFFOLD",
    "finetune": "Fine-tuned",
    "center_only": "Center only",
    "header_only": "Header only",
    "histogram_only": "Histogram only",
    "oracle": "Oracle",
    "guideline": "Guideline",
    "multiclass": "All classes",
    "binary": "Positive against the rest",
    "t1": "T1",
    "t2": "T2",
    "global": "Global",
}
FAMILIES = {  # arms with a parameter value in their name, such as `fedprox_0.1`
    "fedprox": "FedProx (μ={})",
    "fedadam": "FedAdam (η={})",
    "scaffold": "SCAFFOLD (η={})",
    "ditto": "Ditto (λ={})",
    "finetune": "Fine-tuned (lr × {})",
}


def fusion(modality: str) -> tuple[tuple[str, ...], str]:
    """The modalities in a name and how they are fused: `t1+t2_siamese` is (t1, t2), "siamese".

    `channels`: one input channel per modality. `siamese`: one encoder for both, concatenated features. Any
    other name is a single modality, not fused ("").
    """
    fused = re.fullmatch(r"([^+]+)\+([^+]+)_(channels|siamese)", modality)
    return (fused.groups()[:2], fused[3]) if fused else ((modality,), "")


def single(modalities: Sequence[str]) -> tuple[str, ...]:
    """The single modalities of `modalities`, including those of fused names, each once, in order."""
    return tuple(dict.fromkeys(one for modality in modalities for one in fusion(modality)[0]))


def is_personal(arm: str) -> bool:
    """Whether an arm has one model per center; its scores share no scale, so it has no global AUC."""
    return bool(re.match(r"(local_only|fedbn|fedavg_bn_\w+|(ditto|finetune)(_.+)?)\Z", arm))


def family(arm: str) -> str:
    """The arm without its strategy's parameter value: `fedprox` for `fedprox_0.1`; other arms unchanged."""
    name = arm.partition("_")[0]
    return name if name in FAMILIES else arm


def binary_names(positive: tuple[str, ...]) -> tuple[str, str]:
    """Names of the two classes of the binary task, from the names of the positive classes."""
    name = " or ".join(positive)
    return f"not {name}", name


def display_name(name: str) -> str:
    """Display name of a task, model, method or modality; other names, such as centers, stay the same."""
    parts, how = fusion(name)
    if how:
        return f"{' + '.join(map(display_name, parts))} ({how})"
    family, _, value = name.partition("_")
    return DISPLAY.get(name) or (FAMILIES[family].format(value) if family in FAMILIES and value else name)
