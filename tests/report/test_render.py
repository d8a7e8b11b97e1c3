from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from palate.errors import RunError
from palate.report import write_report
from palate.report.signs import SIGNS
from palate.rundir import Status

Write = Callable[..., Path]
Rows = list[dict[str, float]]

VOID = {"meta", "input", "br", "link", "img", "hr"}
SVG = {"svg", "title", "g", "defs", "path", "use", "text", "clippath", "pattern", "rect"}
HTML = {
    "html", "head", "meta", "style", "script", "body", "header", "nav", "main", "footer", "section",
    "article",
    "div", "p", "a", "b", "bdi", "span", "ul", "ol", "li", "dl", "dt", "dd", "h1", "h2", "h3", "h4", "figure",
    "figcaption", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "label", "select",
    "option",
    "input", "button",
}  # fmt: skip
"""Elements of a page; none of them loads anything without an attribute that says from where."""

BEFORE_AFTER = {
    "reward_before": 0.3, "reward_after": 0.8, "win_rate": 0.9, "win_rate_low": 0.8, "win_rate_high": 0.95,
    "compared": 100, "kl": 4.0, "length_before": 30, "length_after": 31, "eos_before": 0.9, "eos_after": 0.9,
}  # fmt: skip

HOSTILE = [
    "<script>alert(1)</script>",
    "</script></style></svg><img src=x onerror=alert(2)>",
    '" onclick="alert(3)" x="',
    "' autofocus onfocus='alert(4)",
    "{{ 7*7 }}{% raw %}",
    "<!-- --><![CDATA[ ]]>&lt;b&gt;",
    "\x1b[31mred\x00\x07\r",
    "\u202eevil\u2066\u200f",
    "\ud83d lone",
    "javascript:alert(5)",
    "word" * 5000,
    "Z̴̧̛͖͉a̸͝l̷g̶̨o̷͝ 🎉👩‍👩‍👧",
]  # fmt: skip


class Page(HTMLParser):
    """Elements, attributes and texts of a page, with a check that every element is closed in its place."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: dict[str, str] = {}
        self._open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        self.text[inside] = self.text.get(inside, "") + data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def said(self) -> str:
        """Everything that a reader sees, with plain spaces."""
        texts = (text for tag, text in self.text.items() if tag not in ("script", "style"))
        return "\n".join(texts).replace("\N{NO-BREAK SPACE}", " ")


def sample(text: str, **numbers: object) -> dict[str, object]:
    row: dict[str, object] = {
        "prompt": text,
        "before": text,
        "after": text,
        "reward_before": 0.1,
        "reward_after": 0.2,
    }
    ends = {"tokens_before": 5, "tokens_after": 6, "finish_before": "eos", "finish_after": text}
    return {**row, **ends, **numbers}


def check_alone(page: Page) -> None:
    """The page loads nothing, runs its own script only, and has no elements but those it is made of."""
    (policy,) = (meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        digest = base64.b64encode(hashlib.sha256(page.text[tag].encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
        assert len(page.all(tag)) == 1
    assert {tag for tag, _ in page.tags} <= HTML | SVG
    for _, attributes in page.tags:
        assert "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        assert (
            not {"src", "srcset", "action", "formaction", "background", "poster", "data", "xlink:href"}
            & attributes.keys()
        )
        assert attributes.get("href", "#").startswith("#")
        for value in attributes.values():
            assert not re.search(r"url\((?!#)", value)
    assert not re.search(r"@import|url\(|https?:|//\w", page.text["style"])
    assert not re.search(r"https?:|\bfetch\b|XMLHttp|import\(|eval\(|innerHTML", page.text["script"])


def check_marked_up(page: Page) -> None:
    """A language, a heading a section, ids used once, and a name for all that is operated or drawn."""
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids
        if attributes.get("href", "#")[1:]:
            assert attributes["href"][1:] in ids
    for drawing in page.all("svg"):
        assert ("aria-labelledby" in drawing and drawing["role"] == "img") != (
            drawing.get("aria-hidden") == "true"
        )
    for table in page.all("div"):
        if table.get("class") == "wide":  # what can be scrolled can be reached by keys
            assert table["tabindex"] == "0"
            assert table["aria-label"]


# ---- Pages -----------------------------------------------------------------------------------------


def test_a_finished_run(write_run: Write, online_rows: Rows) -> None:
    directory = write_run("cheerful", rows=online_rows, samples=[sample("hello")], summary=BEFORE_AFTER)
    path = write_report([directory])
    assert path == directory / "report.html"
    page = Page(path)
    check_alone(page)
    check_marked_up(page)
    said = page.said()
    assert "cheerful · Palate report" in page.text["title"]
    assert "oaif trained smollm2 on everyday: 4 steps. It finished after 1 min 01 s." in said
    for text in (
        "90.0 % [80.0 %, 95.0 %]",
        "0.300 → 0.800",
        "Reward",
        "KL from before",
        "hello",
        "+0.10",
        "float32",
    ):
        assert text in said
    assert f"The {len(SIGNS)} checks found no problem in the numbers of this run" in said


def test_a_run_of_pairs(write_run: Write) -> None:
    rows = [
        {"step": i, "loss": 0.7 - i / 1000, "logps/chosen": -100.0 - i, "step_time": 1.0}
        for i in range(1, 101)
    ]
    rows += [{"step": s, "eval_loss": 0.7, "eval_rewards/accuracies": 0.5 + s / 400} for s in (0, 50, 100)]
    summary = {"accuracy_before": 0.5, "accuracy_after": 0.75, "accuracy_low": 0.45, "accuracy_high": 0.9}
    page = Page(write_report([write_run(rows=rows, summary=summary, method="dpo")]))
    check_alone(page)
    check_marked_up(page)
    said = page.said()
    assert "Held-out accuracy is not above chance" in said
    assert "Chosen completions became less likely" in said
    assert "No samples" in said
    assert "held out" in page.text["text"]


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (
            Status("failed", 3, 8, "the reward <b>broke</b>"),
            "It failed at step 3 of 8: the reward <b>broke</b>.",
        ),
        (Status("interrupted", 3, 8), "repeat the same command"),
        (Status("running", 3, 8), "It was killed at step 3 of 8"),  # no process holds it
    ],
)
def test_a_run_that_did_not_finish(write_run: Write, online_rows: Rows, status: Status, text: str) -> None:
    page = Page(write_report([write_run(rows=online_rows[:3], status=status)]))
    check_alone(page)
    assert text in page.said()
    assert "they are saved at the end of the run" in page.said()


def test_a_run_without_a_step(write_run: Write) -> None:
    page = Page(write_report([write_run(status=Status("interrupted"))]))
    check_alone(page)
    check_marked_up(page)
    assert "No measurements yet." in page.said()
    assert "No steps have been logged yet." in page.said()


def test_one_step_is_enough(write_run: Write, online_rows: Rows) -> None:
    page = Page(write_report([write_run(rows=online_rows[:1])]))
    check_alone(page)
    assert len(page.all("figure")) > 5


def test_a_run_on_demonstrations(write_run: Write) -> None:
    rows = [{"step": i, "loss": 5.0 - i, "step_time": 1.0} for i in (1, 2)]
    config = {"eval_data": "d", "reward": [], "epochs": 1.0}
    summary = {"held_out": 12, "loss_before": 5.5, "loss_after": 4.25}
    said = Page(
        write_report([write_run("a", rows=rows, summary=summary, config=config, method="sft")])
    ).said()
    assert "5.50 → 4.25" in said
    assert "No held-out measurements" not in said
    said = Page(write_report([write_run("b", rows=rows, summary={}, config=config, method="sft")])).said()
    assert "No held-out measurements; add --reward to compare completions." in said


def test_a_reward_model(write_run: Write) -> None:
    rows = [{"step": i, "loss": 0.7, "accuracy": 0.5 * i, "step_time": 1.0} for i in (1, 2)]
    directory = write_run(rows=rows, summary={"ece_before": 0.5, "ece_after": 0.25}, method="reward-model")
    said = Page(write_report([directory])).said()
    assert "0.500 → 0.250" in said
    assert "Accuracy of the reward model" in said
    assert "a reward model cannot generate text" in said


def test_samples_that_were_drawn_once(write_run: Write) -> None:
    rows = [
        {"step": i, "loss": 0.7, "candidates/kept": 8, "completions/mean_length": 11.5, "step_time": 1.0}
        for i in (1, 2, 3)
    ]
    page = Page(write_report([write_run(rows=rows, method="rso")]))
    check_marked_up(page)
    assert "samples (drawn once)" in page.said()
    assert "11.5 tokens" in page.said()


def test_several_runs(write_run: Write, online_rows: Rows, tmp_path: Path) -> None:
    first = write_run(
        "x/a", rows=online_rows, samples=[sample("hello")], summary=BEFORE_AFTER, config={"beta": 0.1}
    )
    clipped = [{**row, "completions/clipped_ratio": 0.9} for row in online_rows[:4]]
    second = write_run("y/a", rows=clipped, samples=[sample("there")], summary={}, config={"beta": 0.2})
    third = write_run("c", rows=clipped, method="dpo", status=Status("failed", 4, 8, "it broke"))
    page = Page(write_report([first, second, third], tmp_path / "all.html"))
    check_alone(page)
    check_marked_up(page)
    said = page.said()
    assert "3 runs" in page.text["title"]
    for text in ("x/a", "y/a", "it broke", "hello", "there"):
        assert text in said
    assert set("ABC") <= set(page.text["text"])  # at the ends of the lines
    assert said.count("Many completions are truncated") == 1  # said once, with both that show it
    assert said.count("reached max_new_tokens") == 2
    assert {row.get("data-run") for row in page.all("li")} >= {"0", "1"}
    differing = re.findall(r'<tr class="differs"><th scope="row">([^<]+)', page.source)
    assert {"beta", "directory", "method"} <= set(differing)
    assert "model" not in differing


def test_runs_that_do_not_compare_say_so(write_run: Write) -> None:
    runs = [write_run(name, summary=BEFORE_AFTER, config={"eval_data": name}) for name in "ab"]
    assert "The runs differ in eval_data" in Page(write_report(runs)).said()


# ---- Hostile texts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_are_texts(write_run: Write, online_rows: Rows, text: str) -> None:
    named = text.replace("/", "∕").replace("\x00", "").encode("utf-8", "replace").decode()[:60]
    rows = [{**row, f"objective/scores/{text}": i, text: i} for i, row in enumerate(online_rows)]
    runs = [
        write_run(
            f"{i}{named}",
            rows=rows,
            samples=[sample(text), sample(text, reward_after=None)],
            summary=BEFORE_AFTER,
            config={text: text, "model": text, "data": text, "reward": [text], "map": {text: text}},
            status=Status("failed", 2, 4, text),
            method=text,
        )
        for i in range(2)
    ]
    for given in (runs[:1], runs):
        page = Page(write_report(given, runs[0] / "page.html"))
        check_alone(page)
        check_marked_up(page)
        visible = "".join("\ufffd" if c in "\x1b\x00\x07\r\u202e\u2066\u200f\ud83d" else c for c in text)
        assert visible in page.text["div"]  # whole, as a completion
        assert not set("\x1b\x00\x07\r\u202e\u2066\u200f") & set(page.source)
        assert "alert(" not in page.text["script"] + page.text["style"]


def test_model_texts_choose_their_own_direction(write_run: Write) -> None:
    page = Page(write_report([write_run(samples=[sample("שלום")])]))
    said = [attributes for attributes in page.all("div") if "said" in attributes.get("class", "").split()]
    assert len(said) == 2
    assert all(attributes["dir"] == "auto" for attributes in said)


def test_sorting_needs_only_numbers(write_run: Write) -> None:
    rows = [sample("<i>"), sample("x", reward_before=None, tokens_after=10**12)]
    page = Page(write_report([write_run(samples=rows)]))
    data = [row for row in page.all("li") if "data-at" in row]
    assert len(data) == 2
    for row in data:
        assert all(re.fullmatch(r"-?[\d.]*(e-?\d+)?", value) for value in row.values())


# ---- Without a script, and on paper ----------------------------------------------------------------


def test_all_samples_are_there_without_a_script(write_run: Write) -> None:
    page = Page(write_report([write_run(samples=[sample(f"text {i}.") for i in range(60)])]))
    assert all(f"text {i}." in page.text["bdi"] for i in range(60))
    folds = [fold for fold in page.all("details") if fold.get("class") == "chunk"]
    assert [("open" in fold) for fold in folds] == [True, False, False]
    controls = [div for div in page.all("div") if "controls" in div.get("class", "").split()]
    assert len(controls) == 3
    assert all("hidden" in div for div in controls)  # they do nothing without it


def test_the_style_knows_dark_paper_and_little_room(write_run: Write) -> None:
    style = Page(write_report([write_run()])).text["style"]
    assert "@media screen and (prefers-color-scheme: dark)" in style  # so that paper stays white
    assert "@media print" in style
    assert "@media (max-width: 40rem)" in style
    light, dark = (set(re.findall(r"(--[a-z0-9]+):", part)) for part in style.split("@media", 2)[:2])
    assert {f"--{kind}{i}" for kind in "st" for i in range(6)} <= light & dark


def test_lines_that_cannot_be_read_are_told(write_run: Write, online_rows: Rows) -> None:
    directory = write_run(rows=online_rows)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write("{broken\n{broken\n")
    assert "2 lines of metrics.jsonl could not be read." in Page(write_report([directory])).said()


# ---- Files -----------------------------------------------------------------------------------------


def test_the_same_run_gives_the_same_page(write_run: Write, online_rows: Rows) -> None:
    directory = write_run(rows=online_rows)
    first = write_report([directory]).read_bytes()
    assert write_report([directory]).read_bytes() == first
    assert sorted(path.name for path in directory.iterdir() if path.name.endswith(".part")) == []


def test_a_comparison_replaces_no_report_of_a_run(write_run: Write, tmp_path: Path) -> None:
    first, second = write_run("a"), write_run("b")
    own = write_report([first])
    before = own.read_bytes()
    both = write_report([first, second])
    assert both.resolve() == first.parent / "report-a-b.html"
    assert first.parent == second.parent
    assert own.read_bytes() == before
    assert write_report([second, first]).name == "report-b-a.html"


def test_the_report_of_distant_runs_lies_where_both_are(
    write_run: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("x/a", "y/a"):
        (tmp_path / place).parent.mkdir()
        write_run("a").rename(tmp_path / place)
    monkeypatch.chdir(tmp_path)
    assert write_report([Path("x/a"), Path("y/a")]) == Path("report-x-a-y-a.html")


def test_names_of_many_runs_fit_into_the_name_of_a_file(write_run: Write) -> None:
    *runs, other = [write_run(letter * 100) for letter in "abcd"]
    path = write_report(runs)
    assert path.name != write_report([*runs[:2], other]).name
    assert len(path.name) < 100


def test_output_that_cannot_be_written(write_run: Write, tmp_path: Path) -> None:
    directory = write_run()
    (tmp_path / "taken").mkdir()
    for output in (tmp_path / "taken", tmp_path / "nowhere" / "r.html", directory / "config.json" / "r.html"):
        with pytest.raises(RunError, match="cannot be written"):
            write_report([directory], output)
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []


def test_nothing_is_written_for_a_run_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run"):
        write_report([tmp_path], tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []
