"""The lean functions against the modules they stand for, and when they are used at all."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from palate.learn import Policy
from palate.model.fast import lean, operations
from palate.model.fast.attention import following
from palate.model.fast.layout import PackedLayout, positions
from palate.testing import KINDS, tiny_config, tiny_model, tiny_policy

PLAIN = operations.Operations()
LEAN = ("llama", "mistral", "qwen2", "qwen3")
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
            operations.normalised(torch.tensor([[3.0, 4.0]]), made), torch.tensor([[1.5, 0.5]])
        )


def test_a_quarter_turn_by_hand() -> None:
    # The pair (x_0, x_1) = (1, 2) turned by 90 degrees is (-2, 1).
    x = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2)
    cos, sin = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    torch.testing.assert_close(operations.rotated(PLAIN, x, cos, sin).flatten(), torch.tensor([-2.0, 1.0]))


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
            total, normed = operations.normed_products(PLAIN, x, x, made, ())
            torch.testing.assert_close(total, x + x, **close)
            torch.testing.assert_close(normed, made(x + x), **close)
            torch.testing.assert_close(
                operations.rotated(PLAIN, x, cos[:, :, None], sin[:, :, None]),
                turned.transpose(1, 2),
                **close,
            )
            gate = operations.gated(PLAIN, x, x + 1)
            torch.testing.assert_close(gate, nn.functional.silu(x) * (x + 1), **close)


def test_derivatives() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    def check(compute: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        assert torch.autograd.gradcheck(compute, [draw(*shape) for shape in shapes])

    def products(hidden: Tensor, change: Tensor | None, weight: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
        norm = SimpleNamespace(weight=weight, variance_epsilon=1e-3)
        pairs = [operations.Map(*maps[:2]), operations.Map(*maps[2:4])] if maps else []
        pairs += [operations.Map(*maps[4:], 0.7)] if maps else []
        return operations.normed_products(PLAIN, hidden, change, norm, pairs)

    maps = (5, 4), (5,), (2, 4), (2,), (6, 4), (6,), (3, 4), (6, 3)  # the last with an adapter
    check(products, (3, 4), (3, 4), (4,), *maps)
    check(lambda hidden, *rest: products(hidden, None, *rest), (3, 4), (4,), *maps)
    check(products, (3, 4), (3, 4), (4,))
    # Not all results are used.
    check(lambda *given: products(*given)[0], (3, 4), (3, 4), (4,), *maps)
    check(lambda *given: products(*given)[1:2], (3, 4), (3, 4), (4,), *maps)
    cos, sin = (part[:, :, None] for part in angles(3, 4))
    check(lambda x: operations.rotated(PLAIN, x, cos, sin), (1, 3, 2, 4))
    check(lambda x, y: operations.gated(PLAIN, x, y), (3, 5), (3, 5))
    check(
        lambda x, *parts: operations.product(PLAIN, x, operations.Map(*parts, 0.7)),
        (3, 5),
        *((2, 5), (2,), (3, 5), (2, 3)),
    )
    check(lambda x, w: operations.product(PLAIN, x, operations.Map(w, None)), (3, 5), (2, 5))

    def block(hidden: Tensor, change: Tensor | None, weight: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
        norm = SimpleNamespace(weight=weight, variance_epsilon=1e-3)
        gate, up = operations.Map(*parts[:4], 0.7), operations.Map(parts[4], None)
        return operations.mlp(PLAIN, hidden, change, norm, [gate, up, operations.Map(*parts[5:], 0.5)])

    gate, up, down = ((5, 4), (5,), (3, 4), (5, 3)), ((5, 4),), ((4, 5), (4,), (2, 5), (4, 2))
    check(block, (3, 4), (3, 4), (4,), *gate, *up, *down)
    check(lambda hidden, *rest: block(hidden, None, *rest), (3, 4), (4,), *gate, *up, *down)
    check(lambda *given: block(*given)[1], (3, 4), (3, 4), (4,), *gate, *up, *down)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in LEAN},
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with a key that it ignores": ("llama", {"sliding_window": 4}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "qwen3 with a window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "llama, stretched": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ),
}


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Directories of tiny models whose biases are not zero."""
    made: dict[str, str] = {}

    def make(name: str) -> str:
        if name not in made:
            kind, changes = VARIANTS[name]
            directory = tiny_model(
                tmp_path_factory.mktemp("variant"), kind=kind, initializer_range=0.2, **changes
            )
            network = AutoModelForCausalLM.from_pretrained(directory)
            generator = torch.Generator().manual_seed(1)
            for key, parameter in network.named_parameters():
                if "bias" in key or "norm" in key:
                    parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
            network.save_pretrained(directory)
            made[name] = directory
        return made[name]

    return make


def policy_of(directory: str, lora: bool, **options: Any) -> Policy:
    """A policy whose adapter, if it has one, does something."""
    policy = tiny_policy(Path(directory), model={"lora": lora, **options})
    if lora:
        generator = torch.Generator().manual_seed(3)
        for _, parameter in policy.model.trained():
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.05).to(parameter.dtype)
    return policy


def states(network: Any, by_itself: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states of a packed row, and gradients of a weighted sum of them."""
    network.zero_grad()
    generator = torch.Generator().manual_seed(0)
    count = sum(prompt + sum(sizes) for prompt, sizes in SHAPE)
    ids = torch.randint(200, (1, count), generator=generator)
    weights = torch.randn(count, 1, generator=generator)
    compute = partial(lean._by_itself, network) if by_itself else lean.states_of(network)
    with following(network):
        found = compute(ids, positions(SHAPE), PackedLayout(SHAPE))
        (found * weights).sum().backward()
    return found.detach(), {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", VARIANTS)
def test_hidden_states_and_gradients_are_those_of_the_models_own_layers(
    name: str, lora: bool, variant: Callable[[str], str], same_gradients: Callable[..., None]
) -> None:
    network = policy_of(variant(name), lora).model.network
    assert lean.kind_of(network) is not None
    (ours, by_ours), (theirs, by_theirs) = states(network, False), states(network, True)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    same_gradients(by_ours, by_theirs)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_in_bfloat16_gradients_are_as_near_to_float32s_as_the_models_own(
    lora: bool, variant: Callable[[str], str]
) -> None:
    exact = states(policy_of(variant("qwen3"), lora).model.network, True)[1]
    network = policy_of(variant("qwen3"), lora).model.network
    for parameter in network.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    ours, theirs = states(network, False)[1], states(network, True)[1]

    def away(found: dict[str, Tensor]) -> float:
        return sum(float((found[key] - exact[key]).square().sum()) for key in exact) ** 0.5

    size = sum(float(gradient.square().sum()) for gradient in exact.values()) ** 0.5
    assert ours.keys() == exact.keys()
    assert away(ours) < 1.2 * away(theirs) < 0.2 * size


def test_checkpointed_layers_give_the_same_bits(variant: Callable[[str], str]) -> None:
    kept = policy_of(variant("llama"), lora=False).model.network
    made_again = policy_of(variant("llama"), lora=False, checkpointing=True).model.network
    made_again.train()
    calls: list[str] = []
    original = lean.layer_states

    def counted(*args: Any, **named: Any) -> tuple[Tensor, Tensor]:
        calls.append("layer")
        return original(*args, **named)

    one, other = states(kept, False), None
    lean.layer_states = counted
    try:
        other = states(made_again, False)
    finally:
        lean.layer_states = original
    assert len(calls) == 2 * len(made_again.base_model.layers)  # once forward, once again in backward
    assert torch.equal(one[0], other[0])
    assert all(torch.equal(gradient, other[1][key]) for key, gradient in one[1].items())


def test_an_adapter_that_is_switched_off_adds_nothing(variant: Callable[[str], str]) -> None:
    policy = policy_of(variant("llama"), lora=True)
    on, _ = states(policy.model.network, False)
    with policy.model.peft.disable_adapter():
        for parameter in policy.model.network.parameters():
            parameter.requires_grad_(True)  # so that there is something to go backward through
        off, _ = states(policy.model.network, False)
        plain, _ = states(policy.model.network, True)
    assert (on - off).abs().max() > 1e-2
    torch.testing.assert_close(off, plain, atol=1e-5, rtol=1e-5)


def test_models_whose_code_is_not_known_compute_themselves(tmp_path: Path) -> None:
    for kind in set(KINDS) - set(LEAN):
        made = AutoModelForCausalLM.from_config(tiny_config(kind))
        assert lean.kind_of(made) is None, kind
    # Layers that are known in a model that is not.
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    assert lean.kind_of(model) == "Llama"
    model.model.__class__ = type("LlamaModel", (type(model.model),), {"__module__": "somewhere.else"})
    assert lean.kind_of(model) is None


@pytest.mark.parametrize("place", ["", "norm", "layers.1", "layers.1.self_attn", "layers.1.mlp.down_proj"])
def test_a_hook_is_not_passed_over(place: str, variant: Callable[[str], str]) -> None:
    network = policy_of(variant("llama"), lora=False).model.network
    module = network.base_model.get_submodule(place)
    seen: list[str] = []
    handle = module.register_forward_hook(lambda *_: seen.append(place))
    assert lean.kind_of(network) is None
    states(network, False)
    assert seen == [place]
    handle.remove()
    handle = module.register_full_backward_hook(lambda *_: None)
    assert lean.kind_of(network) is None
    handle.remove()
    module.forward = module.forward  # as offloading does
    assert lean.kind_of(network) is None
    del module.forward
    assert lean.kind_of(network) == "Llama"


def test_a_hook_where_modules_are_called_does_no_harm(variant: Callable[[str], str]) -> None:
    network = policy_of(variant("llama"), lora=False).model.network
    seen: list[int] = []
    network.get_input_embeddings().register_forward_hook(lambda *_: seen.append(1))
    assert lean.kind_of(network) == "Llama"
    states(network, False)
    assert seen == [1]
