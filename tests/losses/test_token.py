import pytest
import torch
from torch.testing import assert_close

from palate.losses import nll


def test_golden_value_and_gradient() -> None:
    # Tokens of probability 1/2 and 1/4: -log(1/2 * 1/4) = log 8 = 2.079442. A certain completion: 0.
    summed = torch.tensor([0.5, 0.25]).log().sum()
    logps = torch.stack([summed, torch.tensor(0.0)]).requires_grad_()
    loss = nll(logps)
    (slope,) = torch.autograd.grad(loss.sum(), logps)
    assert_close(loss, torch.tensor([2.079442, 0.0]), atol=1e-6, rtol=0)
    assert slope.tolist() == [-1.0, -1.0]


def test_gradient_through_a_softmax_is_probability_minus_target() -> None:
    # One token from logits z = (0, log 3), softmax (1/4, 3/4): L = log 4/3, dL/dz = softmax(z) - (0, 1)
    logits = torch.tensor([[1.0, 3.0]]).log().requires_grad_()
    loss = nll(logits.log_softmax(-1)[:, 1])
    (slope,) = torch.autograd.grad(loss.sum(), logits)
    assert_close(loss, torch.tensor([0.287682]), atol=1e-6, rtol=0)
    assert_close(slope, torch.tensor([[0.25, -0.25]]))


def test_shape_is_checked() -> None:
    with pytest.raises(ValueError, match=r"logps has shape \(2, 3\), expected \(B,\)"):
        nll(torch.zeros(2, 3))
