"""The lean functions against the modules they stand for, and when they are used at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from palate.learn import Policy
from palate.model import lean
from palate.model.attention import following
from palate.model.layout import PackedLayout, positions
from palate.testing import KINDS, tiny_model, tiny_policy

LEAN = ("llama", "mistral", "qwen3")
SHAPE = ((5, (4, 1)), (1, (3,)), (30, (2, 12)))
"""Of a packed row: longer than the windows (8), down to a prompt and a completion of one token."""


def norm(size: int, dtype: torch.dtype = torch.float64) -> LlamaRMSNorm:
    made = LlamaRMSNorm(size, eps=1e-3).to(dtype)
    with torch.no_grad():
        made.weight.copy_(torch.linspace(0.5, 2.0, size))
    return made


def angles(tokens: int, size: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """cos and sin, (1, T, D), whose halves are alike."""
    half = torch.arange(tokens)[:, None] * torch.linspace(1.0, 0.01, size // 2)
    whole = torch.cat((half, half), -1)[None].to(dtype)
    return whole.cos(), whole.sin()


def test_a_norm_by_hand() -> None:
    # mean(x^2) = (9 + 16) / 2 = 12.5, eps makes it 16, so x / 4, times w.
    made = LlamaRMSNorm(2, eps=3.5)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([2.0, 0.5]))
        torch.testing.assert_close(
            lean.normalised(torch.tensor([[3.0, 4.0]]), made), torch.tensor([[1.5, 0.5]])
        )


def test_a_quarter_turn_by_hand() -> None:
    # The pair (x_0, x_1) = (1, 2) turned by 90 degrees is (-2, 1).
    x = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2)
    cos, sin = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    torch.testing.assert_close(lean.rotated(x, cos, sin).flatten(), torch.tensor([-2.0, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_rotation_and_gate_are_those_of_the_modules(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 7, 3, 16, generator=generator).to(dtype)
    rounding = 1e-5 if dtype == torch.float32 else 2**-6
    made = norm(16, dtype)
    cos, sin = angles(7, 16, dtype)
    turned, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    for graded in (False, True):
        with torch.set_grad_enabled(graded):
            close = {"atol": rounding, "rtol": rounding}
            torch.testing.assert_close(lean.normalised(x, made), made(x), **close)
            torch.testing.assert_close(
                lean.rotated(x, cos[:, :, None], sin[:, :, None]), turned.transpose(1, 2), **close
            )
            torch.testing.assert_close(lean.gated(x, x + 1), nn.functional.silu(x) * (x + 1), **close)


def test_derivatives() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    cos, sin = (part[:, :, None] for part in angles(3, 4))
    made = norm(4)

    def normalised(x: Tensor, weight: Tensor) -> Tensor:
        made.weight = nn.Parameter(
            weight.detach()
        )  # the module's shape of things, the checked tensor's graph
        return lean._Normalised.apply(x, weight, made.variance_epsilon)

    assert torch.autograd.gradcheck(normalised, (draw(3, 4), draw(4)))
    assert torch.autograd.gradcheck(lambda x: lean.rotated(x, cos, sin), (draw(1, 3, 2, 4),))
    assert torch.autograd.gradcheck(lean.gated, (draw(3, 5), draw(3, 5)))


@pytest.fixture(scope="module")
def directory_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    made: dict[str, str] = {}

    def make(kind: str) -> str:
        if kind not in made:
            made[kind] = tiny_model(tmp_path_factory.mktemp(kind), kind=kind, initializer_range=0.2)
        return made[kind]

    return make


def policy_of(directory: str, lora: bool) -> Policy:
    """A policy whose adapter, if it has one, does something."""
    policy = tiny_policy(Path(directory), model={"lora": lora})
    if lora:
        generator = torch.Generator().manual_seed(3)
        for _, parameter in policy.model.trained():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return policy


def states(network: Any, by_its_own_code: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states of a packed row, and gradients of a weighted sum of them."""
    network.zero_grad()
    generator = torch.Generator().manual_seed(0)
    count = sum(prompt + sum(sizes) for prompt, sizes in SHAPE)
    ids = torch.randint(200, (1, count), generator=generator)
    weights = torch.randn(count, 1, generator=generator)
    with following(network):
        if by_its_own_code:
            found = network.base_model(
                input_ids=ids,
                position_ids=positions(SHAPE),
                use_cache=False,
                palate_layout=PackedLayout(SHAPE),
            ).last_hidden_state
        else:
            found = lean.hidden_states(network, ids, positions(SHAPE), PackedLayout(SHAPE))
        (found * weights).sum().backward()
    return found.detach(), {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", LEAN)
def test_hidden_states_and_gradients_are_those_of_the_models_own_layers(
    kind: str, lora: bool, directory_of: Callable[[str], str]
) -> None:
    network = policy_of(directory_of(kind), lora).model.network
    assert lean.is_understood(network)
    (ours, by_ours), (theirs, by_theirs) = states(network, False), states(network, True)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    assert by_ours.keys() == by_theirs.keys()
    for name, gradient in by_theirs.items():
        torch.testing.assert_close(by_ours[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def test_an_adapter_that_is_switched_off_adds_nothing(directory_of: Callable[[str], str]) -> None:
    policy = policy_of(directory_of("llama"), lora=True)
    on, _ = states(policy.model.network, False)
    with policy.model.peft.disable_adapter():
        for parameter in policy.model.network.parameters():
            parameter.requires_grad_(True)  # so that there is something to go backward through
        off, _ = states(policy.model.network, False)
        plain, _ = states(policy.model.network, True)
    assert (on - off).abs().max() > 1e-2
    torch.testing.assert_close(off, plain, atol=1e-5, rtol=1e-5)


def test_layers_whose_code_is_not_known_compute_themselves(directory_of: Callable[[str], str]) -> None:
    for kind in set(KINDS) - set(LEAN):
        assert not lean.is_understood(tiny_policy(Path(directory_of(kind))).model.network), kind


def test_a_hook_on_a_layer_is_not_passed_over(directory_of: Callable[[str], str]) -> None:
    network = policy_of(directory_of("llama"), lora=False).model.network
    seen: list[Tensor] = []
    handle = network.base_model.layers[1].register_forward_hook(lambda *_: seen.append(torch.ones(1)))
    assert not lean.is_understood(network)
    states(network, False)
    assert seen
    handle.remove()
    handle = network.base_model.layers[1].mlp.down_proj.register_forward_hook(
        lambda *_: seen.append(torch.ones(1))
    )
    before = len(seen)
    states(network, False)
    assert len(seen) == before + 1
    handle.remove()
    assert lean.is_understood(network)


def test_training_mode_is_left_to_the_layers_since_it_may_checkpoint(
    directory_of: Callable[[str], str],
) -> None:
    network = policy_of(directory_of("llama"), lora=False).model.network
    network.train()
    assert not lean.is_understood(network)
