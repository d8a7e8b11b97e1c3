from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from palate.cli.commands.compare import configured, options
from palate.comparison.arms import Budget, arms_of, lacking, settings_of, spent
from palate.comparison.config import CompareConfig
from palate.errors import ConfigError
from palate.methods import METHODS
from palate.recipe import Share, Spent
from palate.settings import load_config
from palate.spending import Rows, Spending

COMPLETIONS, STEPS, PROMPTS = 640, 10, 400
SHARED = [name for name, method in METHODS.items() if method.share is not None]


def config(**settings: Any) -> CompareConfig:
    base = {
        "methods": "dpo,oaif",
        "data": "everyday",
        "output": "x",
        "reward": "sentiment",
        "budget_steps": 10,
    }
    given = {**base, **settings}
    given = {name: value for name, value in given.items() if value is not None}
    return load_config(CompareConfig, file=None, flags=given, python=True)


def budget(unit: str = "steps", amount: float = STEPS, **facts: Any) -> Budget:
    return Budget(unit, amount, 16, **{"pairwise": False, **facts})


@pytest.mark.parametrize("name", SHARED)
def test_every_method_spends_the_share_and_no_more(name: str) -> None:
    """What a method says of its own spending, its pool included, is the share, to within rounding."""
    share, spends = spending(config(methods=name))
    sampled = spends.sampled + share.pool_prompts * share.pool_n
    assert 0.85 * COMPLETIONS <= sampled <= COMPLETIONS, f"{name} samples {sampled}"
    assert 0.7 * STEPS <= spends.steps <= STEPS, f"{name} takes {spends.steps} steps"


@pytest.mark.parametrize("name", ["rlhf", "rlaif"])
@pytest.mark.parametrize(
    "text",
    ["ppo_epochs: 1", "ppo_epochs: 2\nmini_batches: 2", "estimator: rloo\nn: 4", "estimator: reinforce"],
)
def test_options_of_policy_gradients_leave_the_share_as_it_is(name: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    passed = dict(line.split(": ") for line in text.splitlines() if not line.startswith("n:"))
    ways = [config(methods=f"{name}:{file}")]
    ways += [] if "rloo" in text else [config(methods=name, passed=passed)]
    for cfg in ways:
        _, spends = spending(cfg)
        assert 0.85 * COMPLETIONS <= spends.sampled <= COMPLETIONS
        assert 0.7 * STEPS <= spends.steps <= STEPS


def test_a_wrong_number_of_passes_is_a_mistake_of_the_method() -> None:
    with pytest.raises(ConfigError, match="ppo_epochs"):
        spending(config(methods="rlhf", passed={"ppo_epochs": "many"}))


def spending(cfg: CompareConfig) -> tuple[Spent, Spending]:
    """Return the share of a comparison's only method, and what the method says of its spending."""
    (arm,) = arms_of(cfg)
    share = spent(arm, budget(), PROMPTS)
    values = settings_of(arm, cfg, share, seed=0, data=Path("d.jsonl"), model="smollm2", reward=["sentiment"])
    own = arm.method.configure(values)
    rows = int(values.get("limit") or PROMPTS)
    way = arm.method.way_of(own)
    assert way.spends is not None
    return share, way.spends(own, Rows(rows, rows))


def test_methods_that_train_a_policy_declare_a_share() -> None:
    assert set(METHODS) - set(SHARED) == {"reward-model"}


@pytest.mark.parametrize(
    ("unit", "amount", "facts", "completions"),
    [
        ("steps", 10, {}, 640),
        ("tokens", 6400, {"mean_tokens": 20.0}, 320),
        ("prompts", 40, {}, 160),
        ("verdicts", 480, {}, 480),
        ("verdicts", 480, {"pairwise": True}, 160),
        ("cost", 2.0, {"pairwise": True, "verdict_cost": 0.01}, 66),
    ],
)
def test_units_of_a_budget(unit: str, amount: float, facts: dict[str, Any], completions: int) -> None:
    assert budget(unit, amount, **facts).completions(Share("once", n=4), 4) == completions


def test_few_prompts_get_more_completions_each() -> None:
    made = Share("once", n=4).spent(lambda n: 640, 10, 40)
    assert (made.settings["n"], made.settings["limit"]) == (16, 40)


def test_a_budget_that_is_too_small_is_refused() -> None:
    (arm,) = arms_of(config(methods="rft"))
    with pytest.raises(ConfigError, match="too small for rft"):
        spent(arm, budget(amount=1), PROMPTS)


def test_files_names_and_mistakes(tmp_path: Path) -> None:
    file = tmp_path / "strong.yaml"
    file.write_text("beta: 0.5\nn: 6\n")
    arms = arms_of(config(methods=f"oaif,strong=oaif:{file}"))
    assert [arm.name for arm in arms] == ["oaif", "strong"]
    assert arms[1].share.n == 6
    made = settings_of(
        arms[1],
        config(),
        spent(arms[1], budget(), PROMPTS),
        seed=3,
        data=Path("d"),
        model="m",
        reward=["sentiment"],
    )
    assert (made["beta"], made["n"], made["seed"], made["reward"]) == ("0.5", 6, 3, ["sentiment"]) or made[
        "beta"
    ] == 0.5
    with pytest.raises(ConfigError, match="names oaif twice"):
        arms_of(config(methods="oaif,oaif"))
    with pytest.raises(ConfigError, match="contains a path"):
        arms_of(config(methods="../elsewhere=oaif"))
    with pytest.raises(ConfigError, match="did you mean 'dpo'"):
        arms_of(config(methods="dpoo"))
    with pytest.raises(ConfigError, match="does not declare how it spends"):
        arms_of(config(methods="reward-model"))


def test_a_file_cannot_change_what_is_the_same_for_all(tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text("beta: 0.5\ntemperature: 0.3\nsteps: 500\nbatch_size: 64\n")
    cfg = config(methods=f"dpo:{file}")
    (arm,) = arms_of(cfg)
    assert lacking([arm], cfg) == [
        "batch_size, steps, temperature of the file of odd have no effect: a comparison sets the same for "
        "all methods"
    ]
    share = spent(arm, budget(), PROMPTS)
    made = settings_of(arm, cfg, share, seed=0, data=Path("d"), model="m", reward=["sentiment"])
    assert (made["batch_size"], made["steps"]) == (cfg.batch_size, STEPS)


@pytest.mark.parametrize("prompts", [4, 20, 400])
@pytest.mark.parametrize("name", ["dpo", "click", "rrhf", "iterative-dpo", "pairwise-cringe", "oaif", "sft"])
def test_few_prompts_do_not_make_a_pairwise_judge_dearer(name: str, prompts: int) -> None:
    """A judge answers n (n - 1) questions for n completions, so more for each costs more."""
    amount = 960
    (arm,) = arms_of(config(methods=name))
    share = spent(arm, budget("verdicts", amount, pairwise=True), prompts)
    n = share.pool_n or int(share.settings["n"])
    rows = share.pool_prompts or share.settings.get("limit") or share.settings.get("prompts_per_round")
    rows = rows or share.settings["batch_size"] * share.settings["steps"]
    assert rows * n * (n - 1) * share.settings.get("rounds", 1) <= amount


def test_the_name_of_the_base_is_taken() -> None:
    with pytest.raises(ConfigError, match="names the model that all methods start from"):
        arms_of(config(methods="before training=dpo"))


@pytest.mark.parametrize("line", ["n: 0", "n: x", "n: -2", "n: 1.5", "n:", "n: true"])
def test_a_number_of_completions_that_cannot_be_is_refused(tmp_path: Path, line: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(f"{line}\n")
    with pytest.raises(ConfigError, match="expected a whole number of at least 1"):
        arms_of(config(methods=f"oaif:{file}"))


def test_an_option_that_a_method_lacks_is_named() -> None:
    cfg = config(methods="sft,dpo", passed={"beta": "0.3"})
    assert lacking(arms_of(cfg), cfg) == ["--beta has no effect on sft, which lack it"]
    dpo = arms_of(cfg)[1]
    made = settings_of(
        dpo, cfg, spent(dpo, budget(), PROMPTS), seed=0, data=Path("d"), model="m", reward=["sentiment"]
    )
    assert made["beta"] == "0.3"
    assert "reward" not in made  # its pairs are labelled already


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget_tokens": 5}, "2 budgets are given"),
        ({"budget_steps": None}, "no budgets are given"),
        ({"reward": ()}, "no reward is given"),
    ],
)
def test_one_budget_and_one_annotator(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**settings)


def test_a_configuration_file_may_give_numbers_to_pass_on(tmp_path: Path) -> None:
    file = tmp_path / "compare.yaml"
    file.write_text("methods: rlhf\nreward: sentiment\nbudget_steps: 10\nppo_epochs: 1\nbeta: 0.1\n")
    given = load_config(options(), file=file, flags={"data": "everyday", "output": "x"})
    assert configured(given).passed == {"ppo_epochs": "1", "beta": "0.1"}
