import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from palate.config import OptimConfig
from palate.errors import ConfigError
from palate.learn import Optimizer, Policy
from palate.learn.optim import lr_factor


def parameters(dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
    noise = torch.Generator().manual_seed(0)
    shapes = {"matrix": (4, 3), "gain": (5,), "bias": (3,), "other": (2, 2)}
    return [(name, nn.Parameter(torch.randn(s, generator=noise).to(dtype))) for name, s in shapes.items()]


def optimizer(made: list[tuple[str, nn.Parameter]], *, total_steps: int = 100, **cfg) -> Optimizer:
    return Optimizer(made, OptimConfig(**{"lr": 0.1} | cfg), total_steps=total_steps)


def backward(made: list[tuple[str, nn.Parameter]], seed: int, scale: float = 1.0) -> None:
    """Gives every parameter a random gradient, the way a loss would."""
    noise = torch.Generator().manual_seed(seed)
    loss = sum((p.float() * torch.randn(p.shape, generator=noise)).sum() for _, p in made)
    (scale * loss).backward()


def values(made: list[tuple[str, nn.Parameter]]) -> list[Tensor]:
    return [p.detach().clone() for _, p in made]


def all_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


# ---- steps -----------------------------------------------------------------------------------------


def test_steps_are_those_of_adamw() -> None:
    # Clipping and decay spelt out, the rest torch's.
    made, other = parameters(), parameters()
    adam = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_eps": 1e-3}
    ours = optimizer(made, weight_decay=0.1, max_grad_norm=2.0, schedule="linear", total_steps=10, **adam)
    theirs = torch.optim.AdamW(
        [
            {"params": [p for _, p in other if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for _, p in other if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.8, 0.95),
        eps=1e-3,
    )
    for step in range(6):
        backward(made, step, scale=0.1 + step)
        backward(other, step, scale=0.1 + step)
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for _, p in other))
        for _, p in other:
            p.grad *= min(1.0, 2.0 / norm)
        for group in theirs.param_groups:
            group["lr"] = 0.1 * (1 - step / 10)
        assert ours.step() == pytest.approx(norm, rel=1e-5)  # before clipping
        theirs.step()
        theirs.zero_grad()
        for (_, p), (_, q) in zip(made, other, strict=True):
            torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_gradient_is_scaled_down_to_the_limit(dtype: torch.dtype) -> None:
    for scale, is_large in ((1.0, True), (1e-3, False)):
        made = parameters(dtype)
        ours = optimizer(made, max_grad_norm=0.5, adam_beta1=0.75)
        backward(made, 0, scale=scale)
        raw = {name: g.clone() for name, g in zip(ours.names, ours.gradients(), strict=True)}
        norm = ours.step()
        assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in raw.values())), rel=1e-5)
        assert (norm > 0.5) == is_large
        state = ours.state()
        for name, gradient in raw.items():
            applied = state[f"exp_avg/{name}"] / 0.25  # the first step: all of it is this gradient's
            torch.testing.assert_close(applied, gradient * min(1.0, 0.5 / norm), atol=1e-7, rtol=1e-4)


def test_a_scale_is_of_its_step_alone() -> None:
    made = parameters()
    ours = optimizer(made, max_grad_norm=0.5, adam_beta1=0.75)
    backward(made, 0)
    assert ours.step() > 0.5
    backward(made, 1, scale=math.inf)  # skipped
    assert not math.isfinite(ours.step())
    before = {key: value.clone() for key, value in ours.state().items()}
    backward(made, 2, scale=0.05)
    raw = {name: g.clone() for name, g in zip(ours.names, ours.gradients(), strict=True) if g is not None}
    assert ours.step() < 0.5
    for name, gradient in raw.items():
        key = f"exp_avg/{name}"
        applied = (ours.state()[key] - 0.75 * before[key]) / 0.25
        torch.testing.assert_close(applied, gradient, atol=1e-6, rtol=1e-4)


def test_the_default_format_does_not_decide_the_scale() -> None:
    trained = []
    for default in (torch.float32, torch.float64):
        made = parameters()
        ours = optimizer(made, max_grad_norm=0.5)
        backward(made, 0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            ours.step()
        finally:
            torch.set_default_dtype(before)
        trained.append(values(made))
    assert all_equal(*trained)


def test_weight_decay_falls_on_matrices_alone() -> None:
    made = parameters()
    before = values(made)
    ours = optimizer(made, lr=0.1, weight_decay=0.5)
    backward(made, 0, scale=0.0)  # a gradient of zero leaves the decay alone
    ours.step()
    for (_, p), was in zip(made, before, strict=True):
        torch.testing.assert_close(p.detach(), was * (1 - 0.1 * 0.5) if p.dim() > 1 else was)


def test_gradients_are_dropped_after_a_step() -> None:
    made = parameters()
    ours = optimizer(made)
    assert ours.gradients() == [None] * 4
    backward(made, 0)
    assert all(g is not None for g in ours.gradients())
    ours.step()
    assert ours.gradients() == [None] * 4
    backward(made, 0)
    ours.drop_gradients()
    assert ours.gradients() == [None] * 4


# ---- float32 copies of bfloat16 weights ------------------------------------------------------------


def test_float32_weights_are_their_own_masters() -> None:
    made = parameters()
    assert all(m is p for m, (_, p) in zip(optimizer(made).master, made, strict=True))


def test_bfloat16_weights_have_float32_masters() -> None:
    made = parameters(torch.bfloat16)
    ours = optimizer(made)
    assert {m.dtype for m in ours.master} == {torch.float32}
    assert {p.dtype for _, p in made} == {torch.bfloat16}
    for step in range(3):
        backward(made, step)
        assert all(p.grad is None for _, p in made)  # moved: memory is not held twice
        ours.step()
        assert all_equal(values(made), [m.detach().bfloat16() for m in ours.master])


def test_steps_too_small_for_bfloat16_add_up() -> None:
    # Next to 1, bfloat16 knows 1 - 1/256: steps of 1e-4 are invisible one at a time.
    live = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    ours = optimizer([("gain", live)], lr=1e-4)

    def step() -> None:
        (live.float().sum() * 0.1).backward()
        ours.step()

    step()
    assert torch.equal(live.detach(), torch.ones(3, dtype=torch.bfloat16))
    # Adam's steps under a constant gradient are lr each.
    torch.testing.assert_close(ours.master[0].detach(), torch.full((3,), 1 - 1e-4))
    for _ in range(39):
        step()
    assert torch.equal(live.detach(), torch.full((3,), 1 - 1 / 256, dtype=torch.bfloat16))


def test_gradients_of_bfloat16_weights_add_up_in_float32() -> None:
    # 256 + 1 is 256 in bfloat16: small micro-batches after a large one would be lost.
    live = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    ours = optimizer([("gain", live)])
    for size in [256.0, *[1.0] * 7]:
        (live * size).sum().backward()
    assert ours.gradients()[0].tolist() == [263.0, 263.0]


# ---- gradients that are no numbers -----------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype: torch.dtype, bad: float) -> None:
    made, other = parameters(dtype), parameters(dtype)
    ours, undisturbed = optimizer(made, weight_decay=0.1), optimizer(other, weight_decay=0.1)
    for which, opt in ((made, ours), (other, undisturbed)):
        backward(which, 0)
        opt.step()
    before = values(made)
    backward(made, 1)
    (made[1][1].float().sum() * bad).backward()
    assert not math.isfinite(ours.step())
    assert ours.gradients() == [None] * 4
    assert all_equal(values(made), before)
    # Neither the moments nor the schedule have noticed.
    for which, opt in ((made, ours), (other, undisturbed)):
        backward(which, 2)
        opt.step()
    assert all_equal(values(made), values(other))
    assert ours.steps == 2


# ---- schedule --------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_schedule_has_its_closed_form(schedule: str, warmup: int) -> None:
    total = 25
    cfg = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=warmup)
    for step in range(total):
        if step < warmup:
            expected = (step + 1) / warmup  # rises from one share of the peak to the peak
        else:
            expected = SCHEDULES[schedule]((step - warmup) / (total - warmup))
        assert lr_factor(step, cfg, total) == pytest.approx(expected, abs=1e-12)
    # The first step learns, and so does the last.
    assert lr_factor(0, cfg, total) > 0
    assert lr_factor(total - 1, cfg, total) > 0
    assert lr_factor(warmup, cfg, total) == 1.0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_past_its_end_a_schedule_stays_at_zero(schedule: str) -> None:
    cfg = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=2)
    assert [lr_factor(step, cfg, 10) for step in (10, 11, 25)] == pytest.approx([0, 0, 0], abs=1e-12)
    assert lr_factor(1, cfg, 1) == 1.0  # a run that ends within its warm-up


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_falls_to_the_share_that_is_asked_for(schedule: str) -> None:
    cfg = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=2, final_lr_ratio=0.1)
    falling = [lr_factor(step, cfg, 10) for step in range(2, 11)]
    assert falling == pytest.approx([0.1 + 0.9 * SCHEDULES[schedule](i / 8) for i in range(9)])
    assert falling[-1] == lr_factor(25, cfg, 10) == pytest.approx(0.1)


@pytest.mark.parametrize("warmup", [6, 7])
def test_a_warm_up_that_takes_all_steps_is_refused(warmup: int) -> None:
    live = nn.Parameter(torch.zeros(1))
    ours = optimizer([("x", live)], lr=0.5, warmup_steps=warmup, total_steps=6)
    live.sum().backward()
    with pytest.raises(ConfigError, match=f"warmup_steps is {warmup}, but there are only 6 steps"):
        ours.step()
    with pytest.raises(ConfigError, match="only 2 steps"):
        ours.restart(total_steps=2)
    ours.restart(total_steps=warmup + 1)


def test_the_learning_rate_is_applied() -> None:
    # A constant gradient makes Adam's steps the learning rate itself.
    live = nn.Parameter(torch.zeros(1))
    ours = optimizer([("x", live)], lr=0.5, schedule="linear", warmup_steps=2, total_steps=6)
    expected = [0.25, 0.5, 0.5, 0.375, 0.25, 0.125]
    for rate in expected:
        assert ours.learning_rate() == pytest.approx(rate)
        was = float(live.detach())
        live.sum().backward()
        ours.step()
        assert was - float(live.detach()) == pytest.approx(rate, rel=1e-4)


def test_masters_may_be_the_live_weights_themselves(make_policy: Callable[..., Policy]) -> None:
    live = make_policy(dtype="bfloat16", masters="live").optimizer
    assert all(master is parameter for master, parameter in zip(live.master, live.live, strict=True))
    copies = make_policy(dtype="bfloat16").optimizer
    assert {master.dtype for master in copies.master} == {torch.float32}


# ---- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "masters"),
    [(torch.float32, "float32"), (torch.bfloat16, "float32"), (torch.bfloat16, "live")],
    ids=["float32", "bfloat16", "live"],
)
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_one_that_is_restored_goes_on_to_the_last_bit(
    dtype: torch.dtype, masters: str, schedule: str
) -> None:
    options = {"weight_decay": 0.1, "masters": masters, "schedule": schedule, "warmup_steps": 2}
    made, other = parameters(dtype), parameters(dtype)
    ours, restored = (optimizer(which, total_steps=9, **options) for which in (made, other))
    for step in range(3):
        backward(made, step)
        ours.step()
    state = {name: value.clone() for name, value in ours.state().items()}
    assert {name.split("/")[0] for name in state} == {"weight", "exp_avg", "exp_avg_sq", "step"}
    restored.restore(state, 3)
    for step in range(3, 6):
        assert ours.learning_rate() == restored.learning_rate()
        backward(made, step)
        backward(other, step)
        assert ours.step() == restored.step()
    assert all_equal(values(made), values(other))
    one, two = ours.state(), restored.state()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one)
    # The state that was given is nobody's working memory.
    assert all(torch.equal(state[name], value) for name, value in snapshot_of(3, dtype, options).items())


def snapshot_of(steps: int, dtype: torch.dtype, options: dict) -> dict[str, Tensor]:
    """The state after so many steps, made anew."""
    made = parameters(dtype)
    ours = optimizer(made, total_steps=9, **options)
    for step in range(steps):
        backward(made, step)
        ours.step()
    return ours.state()


def test_received_moments_become_the_optimizers_own() -> None:
    made, other = parameters(), parameters()
    ours, restored = optimizer(made), optimizer(other)
    backward(made, 0)
    ours.step()
    state = {key: value.clone() for key, value in ours.state().items()}
    for name in ours.names:
        kinds = ("weight", "exp_avg", "exp_avg_sq", "step")
        restored.restore_weight(name, {kind: state[f"{kind}/{name}"] for kind in kinds})
    reached = restored.state()
    for key, value in state.items():
        assert torch.equal(reached[key], value)
        # A copy would double the memory of the moments.
        assert (reached[key].data_ptr() == value.data_ptr()) == (not key.startswith("weight/"))


def test_going_back_to_the_start_forgets_the_moments() -> None:
    # Before its first step an optimizer has no moments, so the state has none to put in their place.
    made, other = parameters(), parameters()
    ours, fresh = optimizer(made), optimizer(other)
    start = {name: value.clone() for name, value in ours.state().items()}
    backward(made, 0)
    ours.step()
    ours.restore(start, 0)
    for which, opt in ((made, ours), (other, fresh)):
        backward(which, 1)
        opt.step()
    assert all_equal(values(made), values(other))


def test_a_parameter_without_a_gradient_has_no_moments() -> None:
    made, other = parameters(), parameters()
    ours, restored = optimizer(made), optimizer(other)
    for step in range(2):
        (made[0][1] * (step + 1)).sum().backward()
        ours.step()
    assert {name for name in ours.state() if name.startswith("step/")} == {"step/matrix"}
    restored.restore(ours.state(), 2)
    for which, opt in ((made, ours), (other, restored)):
        backward(which, 2)
        opt.step()
    assert all_equal(values(made), values(other))
