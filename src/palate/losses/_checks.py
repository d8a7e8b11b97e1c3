"""Checks of the arguments of losses; each raises ValueError."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_shapes(axes: str, /, **tensors: Tensor) -> None:
    """Check that all tensors have one shape, with an axis per letter of `axes`.

    Letters: B rows, G completions, T tokens, V vocabulary.
    """
    expected = f"({', '.join(axes)}{',' if len(axes) == 1 else ''})"
    first, like = next(iter(tensors.items()))
    if like.dim() != len(axes):
        raise ValueError(f"{first} has shape {tuple(like.shape)}, expected {expected}")
    check_same_shape(expected, **tensors)


def check_same_shape(expected: str = "of any axes", /, **tensors: Tensor) -> None:
    """Check that all tensors have one shape; `expected` describes allowed shapes in the message."""
    first, like = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.shape != like.shape:
            got, other = tuple(tensor.shape), tuple(like.shape)
            raise ValueError(f"{name} has shape {got} but {first} has {other}, expected one shape {expected}")


def check_positive(**values: float) -> None:
    """Check that strengths and margins are positive: 0 < value < infinity."""
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}, expected a finite number above 0")


def check_not_negative(**values: float) -> None:
    """Check that margins and weights are not negative: 0 <= value < infinity."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}, expected a finite number, 0 or above")


def check_probabilities(**values: Tensor) -> None:
    """Check that soft labels are in [0, 1]; a NaN is an unusable verdict that should have been dropped."""
    for name, tensor in values.items():
        wrong = tensor[~((tensor >= 0) & (tensor <= 1))]
        if wrong.numel():
            raise ValueError(f"{name} has the value {wrong[0].item()}, expected probabilities in [0, 1]")


def check_mask(**masks: Tensor) -> None:
    """Check that masks are bool, since numbers would act as weights."""
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise ValueError(f"{name} is of type {mask.dtype}, expected torch.bool, True for used entries")


def check_label_smoothing(label_smoothing: float) -> None:
    """Check 0 <= label_smoothing < 0.5; with half of the labels flipped, they carry no information."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected at least 0 and below 0.5")
