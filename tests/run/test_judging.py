from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from palate.cli import main
from palate.errors import BudgetError, ConfigError, RunError
from palate.launch import train
from palate.methods import METHODS
from palate.testing import Fault, FaultyServer, ScriptedJudge, judge_reply, tiny_model

KEY = "sk-the-secret-of-this-test"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Q{i}"}) + "\n" for i in range(6)))
    return path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FaultyServer(lambda body, number: judge_reply(body, spaces)) as found:
        yield found


def spaces(first: str, second: str) -> float:
    return 0.5 + 0.4 * ((first > second) - (first < second))


def config(model: str, prompts: Path, method: str = "oaif", **changes: Any) -> Any:
    fixed = {"model": model, "data": str(prompts), "output": prompts.parent / "run", "dtype": "float32",
             "device": "cpu", "lora": False, "max_new_tokens": 6, "steps": 2, "batch_size": 3,
             "fresh_prompts": 0,
             "price_in": 1.0, "price_out": 1.0}  # fmt: skip
    if "judge" in changes:
        fixed["probe_pairs"] = 0
    return METHODS[method].configure({**fixed, **changes})


def spec(server: FaultyServer) -> str:
    return f"server:m@{server.url}"


def rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


# ---- Runs ------------------------------------------------------------------------------------------


def test_a_judged_run_learns_and_says_what_it_cost(server: FaultyServer, model: str, prompts: Path) -> None:
    outcome = train("oaif", config(model, prompts, judge=spec(server), criteria="Be brief."))
    assert outcome.policy.version == 2
    questions = [body["messages"][0]["content"] for body in server.requests]
    assert len(questions) == len(set(questions)) == outcome.summary["judge_verdicts"]
    assert all("What counts: Be brief." in question for question in questions)
    assert outcome.summary["judge_cost"] > 0
    last = rows(outcome.run.directory)[-1]
    assert last["judge/verdicts"] == len(questions)
    assert last["judge/unusable"] == 0.0
    assert (last["judge/cost"], last["judge/tokens"]) == pytest.approx(
        (outcome.summary["judge_cost"], outcome.summary["judge_tokens"])
    )


def test_a_limit_stops_a_run_that_can_be_resumed(
    server: FaultyServer, model: str, prompts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "oaif", "--model", model, "--data", str(prompts), "--output", str(prompts.parent / "run"),
             "--dtype", "float32", "--device", "cpu", "--no-lora", "--max-new-tokens", "6", "--steps", "3",
             "--batch-size", "3", "--fresh-prompts", "0", "--judge", spec(server),
             "--probe-pairs", "0"]  # fmt: skip
    assert main([*words, "--max-verdicts", "8"]) == 130
    said = capfd.readouterr().err
    assert "the judge's limit of 8 verdicts is reached: 8 verdicts took" in said
    assert json.loads((prompts.parent / "run" / "status.json").read_text())["state"] == "interrupted"
    assert main([*words, "--max-verdicts", "8"]) == 130  # it holds for the run's whole life
    assert len(server.requests) == 8
    assert main([*words, "--max-verdicts", "100"]) == 0
    questions = [body["messages"][0]["content"] for body in server.requests]
    assert len(questions) == len(set(questions)) <= 18  # none was asked twice


def test_other_criteria_are_another_run(server: FaultyServer, model: str, prompts: Path) -> None:
    train("oaif", config(model, prompts, judge=spec(server)))
    for change in ({"criteria": "Be rude."}, {"judge": f"server:n@{server.url}"}, {"judge_mode": "score"}):
        with pytest.raises(RunError, match="already holds a run"):
            train("oaif", config(model, prompts, **{"judge": spec(server), **change}))


def test_another_template_is_another_run(server: FaultyServer, model: str, prompts: Path) -> None:
    path = prompts.parent / "mine.jinja"
    path.write_text("{{ criteria }}{{ prompt }}{{ first }}{{ second }}{{ label_first }}{{ label_second }}")
    cfg = config(model, prompts, judge=spec(server), judge_template=path, max_verdicts=0)
    with pytest.raises(BudgetError):
        train("oaif", cfg)
    path.write_text(path.read_text() + "?")
    with pytest.raises(RunError, match="the judge's template changed since the run"):
        train("oaif", cfg)


def test_verdicts_of_one_run_are_free_in_the_next(server: FaultyServer, model: str, prompts: Path) -> None:
    cache = prompts.parent / "verdicts.db"
    judged = {"judge": spec(server), "verdict_cache": cache}
    train("oaif", config(model, prompts, **judged))
    asked = len(server.requests)
    again = train("oaif", config(model, prompts, output=prompts.parent / "other", **judged))
    assert len(server.requests) == asked
    assert (again.summary["judge_cost"], again.summary["judge_verdicts"]) == (0, 0)


def test_the_key_is_nowhere(
    model: str, prompts: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("OPENAI_LOG", "debug")
    caplog.set_level("DEBUG")

    def echo(body: dict[str, Any], number: int) -> Any:
        if number % 4 == 1:
            return Fault(400, f'{{"error": {{"message": "bad key {KEY}"}}}}'.encode())
        return {**judge_reply(body, spaces), "system_fingerprint": KEY}

    with FaultyServer(echo) as server:
        cfg = config(model, prompts, judge=spec(server), judge_key_env="MY_KEY", report_to=("tensorboard",))
        train("oaif", cfg)
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
        assert main(["report", str(prompts.parent / "run")]) == 0
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        main(["run", "oaif", "--judge", f"server:m@http://127.0.0.1:9/v1?key={KEY}", "--data", str(prompts)])
    said = capfd.readouterr()
    found = [
        path for path in prompts.parent.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()
    ]
    assert found == []
    assert KEY not in said.out
    assert KEY not in caplog.text
    # What the user typed into the address is not repeated either.
    assert KEY not in said.err


def test_a_server_that_says_nothing_usable_makes_dead_steps(model: str, prompts: Path) -> None:
    def mumble(body: dict[str, Any], number: int) -> Any:
        reply = judge_reply(body, spaces)
        for top in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            top["logprob"] = -5.0
        return reply

    with (
        FaultyServer(mumble) as server,
        pytest.raises(RunError, match="no pair to learn from in 2 steps in a row"),
    ):
        train("oaif", config(model, prompts, judge=spec(server), max_dead_steps=2, steps=5))


def test_a_server_that_is_not_there_is_an_error(model: str, prompts: Path) -> None:
    with pytest.raises(ValueError, match="requests failed"):
        train("oaif", config(model, prompts, judge="server:m@http://127.0.0.1:9/v1", judge_retries=0))


# ---- Other judges ----------------------------------------------------------------------------------


def test_the_policy_as_its_own_judge(model: str, prompts: Path) -> None:
    path = prompts.parent / "short.jinja"
    path.write_text("{{ prompt }}{{ first }}{{ second }}{{ label_first }}{{ label_second }}")
    cfg = config(model, prompts, judge="self", judge_template=path, judge_label_mass=0.0, steps=2)
    outcome = train("oaif", cfg)
    assert outcome.policy.version == 2
    assert outcome.summary["judge_verdicts"] > 0


def test_a_local_judge_and_its_score(model: str, prompts: Path) -> None:
    path = prompts.parent / "short.jinja"
    path.write_text("{{ prompt }}{{ completion }}")
    options = {"judge_mode": "score", "judge_template": path, "judge_label_mass": 0.0}
    outcome = train("oaif", config(model, prompts, judge=f"local:{model}", **options))
    assert -1 <= rows(outcome.run.directory)[-1]["objective/scores"] <= 1


def test_a_judge_from_python(model: str, prompts: Path) -> None:
    cfg = config(model, prompts, price_in=None, price_out=None)
    asked: list[str] = []

    def prefer(first: str, second: str) -> float:
        asked.append(first)
        return spaces(first, second)

    outcome = train("oaif", cfg, judge=ScriptedJudge(prefer))
    assert outcome.policy.version == 2
    assert len(asked) == 12  # two orders of six pairs


@pytest.mark.parametrize("method", ["rest", "rft", "iterative-dpo", "dpo"])
def test_a_judge_in_other_methods(server: FaultyServer, model: str, prompts: Path, method: str) -> None:
    changes: dict[str, Any] = {"judge": spec(server)}
    if method == "dpo":
        pairs = prompts.parent / "pairs.jsonl"
        pairs.write_text(
            "".join(json.dumps({"prompt": f"Q{i}", "chosen": "a", "rejected": "b"}) + "\n" for i in range(4))
        )
        changes |= {"data": str(pairs), "eval_data": str(pairs), "eval_split": "train"}
    else:
        changes |= {"rounds": 1, "n": 2} if method != "rest" else {"n": 2}
    if method in ("rest", "rft"):
        changes |= {"judge_mode": "score"}
        server._answer = lambda body, number: scores(body)
    outcome = train(method, config(model, prompts, method, **changes))
    assert outcome.summary["judge_verdicts"] > 0


def scores(body: dict[str, Any]) -> dict[str, Any]:
    """Scores that depend on the text."""
    number = sum(body["messages"][0]["content"].encode()) % 10 + 1
    tops = [{"token": str(i), "logprob": -0.05 if i == number else -6.0} for i in range(1, 11)]
    place = {"token": str(number), "logprob": -0.05, "top_logprobs": tops}
    choice = {
        "message": {"content": str(number)},
        "finish_reason": "length",
        "logprobs": {"content": [place]},
    }
    return {"model": "m", "choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}


# ---- What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": "human"}, "judge 'human' cannot be asked during a run"),
        ({"judge": "someone"}, "judge 'someone' is unknown; expected local:MODEL"),
        ({"judge": "local:"}, "judge 'local:' is unknown"),
        ({"judge": "self:x"}, "judge 'self:x' is unknown"),
        ({"judge": "server:m"}, "judge 'server:m' names no server"),
        ({"judge": "server:m@https://h.invalid/v1", "judge_key_env": "NO_SUCH_KEY"}, "variable NO_SUCH_KEY"),
        (
            {"judge": "server:m@http://h.invalid/v1", "max_cost": 1.0, "price_in": None, "price_out": None},
            "unknown",
        ),
        (
            {"judge": "server:m@http://h.invalid/v1", "price_out": None},
            "--price-in and --price-out go together",
        ),
        ({"judge": "self", "reward": "sentiment"}, "judge is 'self' and reward is sentiment; give one"),
        ({"criteria": "Be brief.", "price_in": None, "price_out": None}, "criteria is given without a judge"),
        ({"max_cost": 1.0, "price_in": None, "price_out": None}, "max_cost is given without a judge"),
    ],
)
def test_what_is_refused(
    model: str, prompts: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises((ConfigError, ValueError)) as caught:
        train("oaif", config(model, prompts, **changes))
    assert message in str(caught.value)


def test_a_block_in_yaml(
    model: str, prompts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    head = f"model: {model}\ndata: {prompts}\noutput: {tmp_path / 'run'}\n"
    path.write_text(head + "judge:\n  model: human\n  mode: score\n  criteria: Be brief.\n  max-cost: 0.5\n")
    assert main(["run", "oaif", "--config", str(path)]) == 2
    assert "judge 'human' cannot be asked" in capfd.readouterr().err
    path.write_text(head + "judge:\n  modle: human\n")
    assert main(["run", "oaif", "--config", str(path)]) == 2
    assert "judge has no option 'modle'; its options are model, mode," in capfd.readouterr().err
    path.write_text(head + "judge:\n  model: self\n  mode: best\n")
    assert main(["run", "oaif", "--config", str(path)]) == 2
    assert "judge.mode is 'best', expected one of pairwise, score, rubric" in capfd.readouterr().err


def test_a_block_in_python(model: str, prompts: Path) -> None:
    cfg = config(model, prompts, judge={"model": "self", "mode": "score", "max_cost": 2.0})
    assert (cfg.judge, cfg.judge_mode, cfg.max_cost) == ("self", "score", 2.0)
    with pytest.raises(ValueError, match="criteria is given both inside and outside the judge block"):
        config(model, prompts, judge={"model": "self", "criteria": "a"}, criteria="b")
