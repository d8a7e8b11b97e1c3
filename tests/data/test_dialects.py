"""Rows as other toolkits write them, read without a map."""

import json

import pytest

from palate.data import Account, read_comparisons, read_demonstrations, read_prompts
from palate.types import Comparison, Demonstration, Prompt


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


U, A, B, S = user("A fish?"), assistant("A ling."), assistant("A whale."), system("Be brief.")
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "tide", "arguments": {"port": "Wick"}}}


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        # Llama-Factory
        ({"instruction": "A fish?", "output": ["A ling.", "A whale."]}, "A fish?", "A ling.", "A whale."),
        (
            {"instruction": "A fish?", "system": "Be brief.", "chosen": "A ling.", "rejected": "A whale."},
            (S, U),
            (A,),
            (B,),
        ),
        (
            {
                "conversations": [{"from": "human", "value": "A fish?"}],
                "chosen": {"from": "gpt", "value": "A ling."},
                "rejected": {"from": "gpt", "value": "A whale."},
            },
            (U,),
            (A,),
            (B,),
        ),
        # ms-swift
        ({"messages": [U, A], "rejected_response": "A whale."}, (U,), (A,), (B,)),
        ({"messages": [S, U, A], "rejected_messages": [S, U, B]}, (S, U), (A,), (B,)),
        ({"query": "A fish?", "response": "A ling.", "rejected_response": "A whale."},
         "A fish?", "A ling.", "A whale."),
        # OpenAI
        ({"input": {"messages": [U], "tools": []}, "preferred_output": [A], "non_preferred_output": [B]},
         (U,), (A,), (B,)),
        # distilabel, UltraFeedback, RLHFlow
        ({"instruction": "A fish?", "generations": ["A whale.", "A bat.", "A ling."], "ratings": [2, 1, 5]},
         "A fish?", "A ling.", "A bat."),
        ({"system": "", "input": "A fish?", "chosen": "A ling.", "rejected": "A whale.", "rating": [5, 1]},
         "A fish?", "A ling.", "A whale."),
        (
            {
                "instruction": "A fish?",
                "completions": [
                    {"response": "A whale.", "overall_score": 2.5},
                    {"response": "A ling.", "overall_score": 8.0},
                ],
            },
            "A fish?",
            "A ling.",
            "A whale.",
        ),
        ({"prompt": "A fish?", "responses": ["A whale.", "A ling."], "rewards": [-1.5, 0.5]},
         "A fish?", "A ling.", "A whale."),
        # other spellings
        ({"prompt": [U], "chosen": {"content": "A ling."}, "rejected": {"content": "A whale."}}, (U,), (A,),
        (B,)), ({"chosen": json.dumps([U, A]), "rejected": json.dumps([U, B])}, (U,), (A,), (B,)), ({"system":
        "Be brief.", "chosen": [U, A], "rejected": [U, B]}, (S, U), (A,), (B,)),
    ],
)  # fmt: skip
def test_comparisons(data, row, prompt, chosen, rejected):
    ((found,), same) = read_comparisons(data(row))
    assert (found.prompt.content, found.chosen, found.rejected, same) == (prompt, chosen, rejected, 0)


def test_answers_with_equal_scores_are_no_pair(data):
    account = Account()
    rows = [
        {"instruction": "a", "generations": ["b", "c"], "ratings": ratings} for ratings in ([3, 3], [1, 2])
    ]
    kept, same = read_comparisons(data(*rows), account=account)
    assert (len(kept), same, kept[0].margin) == (1, 1, 1.0)


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"query": "A fish?", "response": "A ling."}, "A fish?", "A ling."),
        ({"query": "A fish?", "response": "A ling.", "system": "Be brief."}, (S, U), (A,)),
        ({"query": "A fish?", "response": "A ling.", "history": [["Hi", "Hello"]]},
         (user("Hi"), assistant("Hello"), U), (A,)),
        ({"instruction": "A fish?", "generation": "A ling."}, "A fish?", "A ling."),
        ({"conversation": [{"human": "A fish?", "assistant": "A ling."}]}, (U,), (A,)),
        ({"conversations": [{"from": "human", "value": "A fish?"}, {"from": "gpt", "value": "A ling."}],
          "system": "Be brief."}, (S, U), (A,)),
        ({"messages": [U, A], "label": True}, (U,), (A,)),
        ({"messages": [{"role": "Human", "content": "A fish?"}, {"role": "model", "content": "A ling."}]},
         (U,), (A,)),
        ({"messages": [U, assistant("A ling.", reasoning_content="hm")]}, (U,),
         (assistant("A ling.", reasoning_content="hm"),)),
        ({"messages": [U, {"role": "assistant", "thinking": "hm", "content": ""}]}, (U,),
         (assistant("", thinking="hm"),)),
    ],
)  # fmt: skip
def test_demonstrations(data, row, prompt, completion):
    (found,) = read_demonstrations(data(row))
    assert found == Demonstration(Prompt(prompt), completion)


def test_a_question_with_a_context_is_not_read_unasked(data):
    row = {"query": "A fish?", "context": "Of these: ling, whale.", "response": "A ling."}
    account = Account(max_bad_rows=0.5)
    read_demonstrations(data(row, {"prompt": "a", "completion": "b"}), account=account)
    assert "completion is missing" in account.skipped[0].message


@pytest.mark.parametrize(
    "turn",
    [
        assistant("", tool_calls=[CALL]),
        {"role": "assistant", "tool_calls": [CALL], "content": None},
        {"role": "assistant", "function_call": {"name": "tide", "arguments": {"port": "Wick"}}},
        {"from": "function_call", "value": '{"name": "tide", "arguments": {"port": "Wick"}}'},
    ],
)
def test_tool_calls(data, turn):
    result = {"role": "tool", "content": "04:12"}
    row = {"messages": [U, turn, result, assistant("At 4.12.")], "tools": json.dumps([TOOL])}
    (found,) = read_demonstrations(data(row))
    assert found.prompt.content[1]["tool_calls"] == [CALL]
    assert found.prompt.content[1].get("content", "") == ""
    assert found.prompt.variables == {"tools": [TOOL]}
    assert dict(found.prompt.columns) == {}
    (called,) = read_demonstrations(data({"messages": [U, turn], "tools": [TOOL["function"]]}))
    assert called.completion[0]["tool_calls"] == [CALL]
    assert called.prompt.variables == {"tools": [TOOL]}


def test_empty_keys_of_columnar_files_are_no_arguments(tmp_path):
    from palate.data import write_rows

    one, two = ({"type": "function", "function": {"name": n, "arguments": {n: 1}}} for n in ("a", "b"))
    rows = [{"messages": [U, assistant("", tool_calls=[call])]} for call in (one, two)]
    write_rows(tmp_path / "d.parquet", rows)
    found = read_demonstrations(str(tmp_path / "d.parquet"))
    assert [row.completion[0]["tool_calls"][0]["function"]["arguments"] for row in found] == [
        {"a": 1},
        {"b": 1},
    ]


def test_arguments_of_the_template(data):
    (found,) = read_prompts(data({"prompt": "a", "chat_template_kwargs": {"enable_thinking": False}}))
    assert found.variables == {"enable_thinking": False}


# ---- The account -----------------------------------------------------------------------------------


def test_marks_not_to_learn(data):
    account = Account()
    rows = [
        {"messages": [U, A, user("No."), assistant("Sorry.", weight=0)]},
        {"messages": [U, assistant("A bat.", train=False), user("Look."), A]},
        {"messages": [U, assistant("A bat.", loss=False)]},
        {"prompt": "A fish?", "completion": "A whale.", "label": False},
        {"prompt": "A fish?", "completion": "A ling.", "label": True},
    ]
    found = read_demonstrations(data(*rows), account=account)
    assert [
        row.completion if isinstance(row.completion, str) else row.completion[0]["content"] for row in found
    ] == [
        "A ling.",
        "A ling.",
        "A ling.",
    ]
    assert found[0].prompt.content == (U,)
    assert [tally.count for tally in account.dropped.values()] == [2]
    assert "turns after the answer that is learnt" in account.unused
    assert any("marked not to be learnt; an earlier one" in note for note in account.notes)


def test_every_column_that_is_not_used_is_named_once(data):
    account = Account()
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "id": n, "score_chosen": 8} for n in range(3)]
    path = data(*rows)
    read_comparisons(path, account=account)
    (line,) = account.lines()
    assert (
        line
        == f"not used: column 'id' (3 rows, first {path}:1); column 'score_chosen' (3 rows, first {path}:1)"
    )
    assert account.summary()["unused"]["column 'id'"] == {"rows": 3, "first": f"{path}:1"}


def test_bad_rows_are_skipped_while_they_are_few(data):
    good = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 9
    account = Account()
    kept, _ = read_comparisons(data(*good, {"prompt": "a", "chosen": "b"}), account=account)
    assert (len(kept), account.bad, account.rows) == (9, 1, 10)
    assert account.skipped[0].reason == "rejected is missing"
    assert account.skipped[0].where.endswith(":10")
    assert "skipped 1 of 10 rows that cannot be used: 1 x rejected is missing" in list(account.lines())


def test_too_many_bad_rows_are_refused_with_the_commonest_reasons(data):
    bad = [{"prompt": "a", "chosen": "b"}] * 3 + [{"prompt": 3, "chosen": "b", "rejected": "c"}] * 2
    path = data(
        {"prompt": "a", "chosen": "b", "rejected": "c"}, *bad, {"prompt": [], "chosen": "a", "rejected": "c"}
    )
    with pytest.raises(
        ValueError, match=r"6 of 7 rows cannot be used.*3 x rejected is missing.*2 x prompt is a n"
    ):
        read_comparisons(path, account=Account())
    kept, _ = read_comparisons(path, account=Account(max_bad_rows=0.9))
    assert len(kept) == 1
    with pytest.raises(ValueError, match=r"d\.jsonl:2: rejected is missing"):
        read_comparisons(path, account=Account(strict=True))


def test_lines_that_are_no_json_are_bad_rows(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"prompt": "a"}\nnot json\n{"prompt": "b"}\n\xff\n')
    account = Account(max_bad_rows=0.5)
    assert [prompt.content for prompt in read_prompts(str(path), account=account)] == ["a", "b"]
    assert sorted(account.reasons) == ["the line is not JSON", "the line is not UTF-8"]
    path.write_bytes(b"no\nno\n")
    with pytest.raises(
        ValueError,
        match=r"d.jsonl: no row can be used\. 2 x the line is not JSON .* Prompts need the column prompt",
    ):
        read_prompts(str(path), account=Account())


def test_a_margin_that_cannot_be_used_is_left_out(data):
    account = Account()
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": m}
        for m in (-0.5, float("nan"), True, 10**400, "2", 3)
    ]
    kept, _ = read_comparisons(data(*rows), account=account)
    assert [row.margin for row in kept] == [None, None, None, None, 2.0, 3.0]
    assert list(account.notes) == ["margin is not a number of 0 or more; it is ignored"]


def test_comparison_of_a_table(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("system,prompt,chosen,rejected,margin\nBe brief.,A fish?,A ling.,A whale.,1.5\n,1,2,3,\n")
    kept, _ = read_comparisons(str(path))
    assert kept == [
        Comparison(Prompt((S, U)), (A,), (B,), 1.5),
        Comparison(Prompt("1"), "2", "3"),
    ]
