"""Trained networks -> a MONAI bundle with its model card."""

from ipmn_core.bundle.export import export, inference_config
