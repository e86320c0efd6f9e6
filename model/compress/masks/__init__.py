"""Depth pruning by mask learning: which blocks of a chain to keep (arXiv 2508.17434, section 3.1)."""

from model.compress.masks.baselines import METHODS, Subject, random_mask, select, sensitivity_mask, similarity_mask
from model.compress.masks.bypass import bypass
from model.compress.masks.decide import Mask, check_mask
from model.compress.masks.learner import History, MaskLearner, Schedule, learn
from model.compress.masks.losses import mask_loss

__all__ = [
    "METHODS",
    "History",
    "Mask",
    "MaskLearner",
    "Schedule",
    "Subject",
    "bypass",
    "check_mask",
    "learn",
    "mask_loss",
    "random_mask",
    "select",
    "sensitivity_mask",
    "similarity_mask",
]
