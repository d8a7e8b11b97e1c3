from __future__ import annotations

import pytest

from palate.methods import METHODS
from palate.near import ELSEWHERE, INSTEAD, near, setting_near
from palate.settings import offered

KNOWN = {name for method in METHODS.values() for name in offered(method.options)}
PAIRS = [(other, own) for own, others in ELSEWHERE.items() for other in others.split()]


def test_a_mistyped_word() -> None:
    assert near("sentimet", ["sentiment", "length"]) == "sentiment"
    assert near("xyz", ["sentiment", "length"]) is None


@pytest.mark.parametrize(
    ("other", "own"),
    [
        ("learning_rate", "lr"),
        ("--learning-rate", "lr"),
        ("per_device_train_batch_size", "batch_size"),
        ("num_train_epochs", "epochs"),
        ("max_completion_length", "max_new_tokens"),
        ("max_new_token", "max_new_tokens"),
        ("model_name_or_path", "model"),
        ("dataset_name", "data"),
        ("dataset", "data"),
        ("output_dir", "output"),
        ("gradient_checkpointing", "checkpointing"),
        ("lora_r", "lora_rank"),
        ("warmup_ratio", "warmup_steps"),
        ("max_prompt_length", "max_length"),
        ("cutoff_len", "max_length"),
        ("pref_beta", "beta"),
        ("num_generations", "n"),
        ("bf16", "dtype"),
        ("pretrain", "model"),
        ("betta", "beta"),
        ("--lerning-rate", "lr"),
        ("num_generation", "n"),
    ],
)
def test_the_settings_of_other_trainers(other: str, own: str) -> None:
    assert setting_near(other, KNOWN) == own


def test_the_first_setting_that_exists_is_suggested() -> None:
    assert setting_near("loss_type", ["variant", "beta"]) == "variant"
    assert setting_near("loss_type", ["variant", "loss"]) == "loss"
    assert setting_near("num_generations", ["zeta"]) is None


def test_a_method_without_a_setting_suggests_the_one_that_it_has_instead() -> None:
    assert setting_near("epochs", ["steps", "lr"]) == "steps"
    assert setting_near("num_train_epochs", ["steps", "lr"]) == "steps"
    assert setting_near("epochs", ["lr", "beta"]) is None
    assert setting_near("zzz", KNOWN) is None


def test_the_tables_suggest_settings_that_exist() -> None:
    assert ELSEWHERE.keys() <= KNOWN
    assert {*INSTEAD, *INSTEAD.values()} <= ELSEWHERE.keys()


@pytest.mark.parametrize(("other", "own"), PAIRS)
def test_the_table_has_no_setting_of_this_program_as_a_foreign_one(other: str, own: str) -> None:
    assert other not in KNOWN, f"{other} is a setting itself"
