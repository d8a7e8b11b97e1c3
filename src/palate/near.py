"""Suggestions for mistyped words, and for settings by the names that other trainers give them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

ELSEWHERE: Mapping[str, str] = {
    "model": "model_name_or_path model_name model_id pretrain model_path",
    "data": "dataset dataset_name dataset_path dataset_dir train_dataset train_file train_files prompt_data",
    "split": "dataset_split dataset_train_split prompt_split train_split",
    "limit": "max_samples max_train_samples",
    "eval_data": "eval_dataset val_file val_files validation_file",
    "eval_split": "dataset_test_split test_split",
    "eval_limit": "max_eval_samples",
    "output": "output_dir save_path default_local_dir logging_dir run_name",
    "overwrite": "overwrite_output_dir",
    "lr": "learning_rate actor_learning_rate",
    "schedule": "lr_scheduler lr_scheduler_type",
    "warmup_steps": "warmup_ratio lr_warmup_ratio num_warmup_steps lr_warmup_steps",
    "max_grad_norm": "max_norm grad_clip",
    "weight_decay": "l2",
    "adam_eps": "adam_epsilon epsilon",
    "adam_beta2": "beta2",
    "epochs": "num_train_epochs num_epochs max_epochs total_epochs",
    "steps": "max_steps num_train_steps num_training_steps total_training_steps total_episodes",
    "rounds": "num_iterations iterations",
    "batch_size": "per_device_train_batch_size train_batch_size rollout_batch_size mini_batch_size",
    "micro_batch_tokens": "gradient_accumulation_steps micro_train_batch_size micro_batch_size",
    "checkpointing": "gradient_checkpointing",
    "checkpoint_every": "save_steps save_strategy",
    "keep_checkpoints": "save_total_limit max_ckpt_num",
    "eval_every": "eval_steps eval_strategy evaluation_strategy",
    "seed": "random_seed data_seed",
    "report_to": "wandb_project use_wandb use_tensorboard",
    "dtype": "bf16 fp16 fp32 torch_dtype load_in_4bit load_in_8bit",
    "lora": "use_peft finetuning_type",
    "lora_rank": "lora_r",
    "chat_template": "template chat_template_path custom_chat_template apply_chat_template",
    "map": "input_key output_key prompt_key chosen_key rejected_key dataset_text_field columns",
    "max_length": "max_prompt_length cutoff_len max_len max_seq_len max_seq_length prompt_max_len",
    "max_new_tokens": "max_completion_length max_new_token max_tokens max_response_length generate_max_len",
    "n": "num_generations num_return_sequences n_samples_per_prompt best_of_n num_samples",
    "temperature": "do_sample",
    "stop": "stop_sequences stop_strings stop_words",
    "beta": "pref_beta dpo_beta kl_coef init_kl_coef",
    "loss": "loss_type pref_loss",
    "variant": "loss_type pref_loss",
    "reward": "reward_funcs reward_fn reward_function reward_model reward_model_path reward_pretrain",
    "judge": "judge_model",
    "fast": "use_liger_kernel use_vllm",
    "compile": "torch_compile use_torch_compile",
    "threads": "num_threads",
}
"""Settings of TRL, transformers, LLaMA-Factory, OpenRLHF and verl, under the setting here that does the same.

A name may stand under several settings, since methods differ. The first that exists is suggested.
"""

INSTEAD: Mapping[str, str] = {"epochs": "steps"}
"""Settings that some methods lack, with the setting that sets the same thing there."""


def near(word: str, words: Iterable[str]) -> str | None:
    """Return the item of `words` closest to `word`; None if none is close."""
    return next(iter(difflib.get_close_matches(word.lower(), words, n=1, cutoff=0.65)), None)


def setting_near(name: str, settings: Iterable[str]) -> str | None:
    """Return the setting that an unknown name means; None if no setting is likely.

    Args:
        name: as the user wrote it, also as a flag.
        settings: the names that exist, with underscores.
    """
    known = list(settings)
    bare = name.lstrip("-").replace("-", "_").lower()
    named: dict[str, str] = {}
    for own, others in ELSEWHERE.items():
        instead = own if own in known else INSTEAD.get(own)
        if instead in known:
            for other in (own, *others.split()):
                named.setdefault(other, instead)
    return named.get(bare) or near(bare, known) or named.get(near(bare, named) or "")
