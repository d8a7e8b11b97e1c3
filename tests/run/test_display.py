from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from palate.run import Display, plain
from palate.types import Completion, Group, Prompt

ROW = {"step": 2, "step_time": 1.25, "loss": 0.5, "objective/scores": 0.1234, "rewards/accuracies": 0.75}
EVERY = {
    "objective/scores": 0.5,
    "objective/scores_margin": 0.25,
    "loss": 0.6931,
    "rewards/margins": 0.01,
    "rewards/accuracies": 0.5,
    "objective/kl": 1.5,
    "completions/mean_length": 40.0,
    "val/contain_eos_token": 0.9,
    "pairs/dropped": 1.0,
    "grad_norm": 2.0,
    "step": 1,
    "step_time": 2.0,
}
# Recolour, clear the screen, name the window, ring, go back over the line, C1 and its 8-bit escape.
ESCAPES = "\x1b[31mred \x1b[2J\x1b]0;title\x07 \a\b\r\x7f\x85\x9b1m end"
BIDI = "".join(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]))


def group(text: str, prompt: str = "Q", reward: float | None = 1.0) -> Group:
    return Group(Prompt(prompt), (Completion(text, (1,)),), (reward,))


def file_display(**options: object) -> tuple[Display, io.StringIO]:
    out = io.StringIO()
    return Display(Console(file=out, force_terminal=False, width=80, **options)), out  # type: ignore[arg-type]


# ---- Where the output is no terminal ---------------------------------------------------------------


@pytest.mark.parametrize("titled", [False, True])
def test_a_line_per_step(titled: bool) -> None:
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=False, width=80), titled=titled)
    display.start("oaif", Path("runs/x"))
    display.expect(3)
    for step in (1, 2):
        display.step(step - 1)
        display.working("sample", 10.0)
        display.metrics({**ROW, "step": step}, [group("hello")])
    display.stop()
    assert out.getvalue().splitlines() == [
        *(["oaif  runs/x"] if titled else []),
        "step 1/3  reward 0.123  loss 0.5000  accuracy 75%  1.2 s",
        "step 2/3  reward 0.123  loss 0.5000  accuracy 75%  1.2 s",
    ]


def test_a_long_line_stays_one() -> None:
    # Redirected to a file, rich takes 80 columns; a line per step is what a log is searched by.
    display, out = file_display()
    display.metrics(EVERY, [])
    display.say("word " * 40)
    assert len(out.getvalue().splitlines()) == 2
    assert len(out.getvalue().splitlines()[0]) > 80


@pytest.mark.parametrize(
    ("share", "penalised", "warnings"), [(0.2, False, 0), (0.21, False, 1), (0.21, True, 0)]
)
def test_many_truncated_completions_are_reported_once(share: float, penalised: bool, warnings: int) -> None:
    display, out = file_display()
    display.penalised = penalised
    for step in (1, 2):
        display.metrics({**ROW, "step": step, "completions/clipped_ratio": share}, [])
    assert out.getvalue().count("of the completions were truncated at max_new_tokens") == warnings


def test_no_colours_in_a_file() -> None:
    display, out = file_display()
    display.metrics(EVERY, [])
    assert "\x1b" not in out.getvalue()


def test_quiet_says_nothing() -> None:
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=True), quiet=True)
    display.start("oaif", Path("runs/x"))
    display.say("hello")
    display.metrics(ROW, [group("hello")])
    display.stop()
    assert out.getvalue() == ""


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    # stdout is for results.
    Display().say("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_what_is_said_is_no_markup() -> None:
    display, out = file_display()
    display.say("[bold]x[/bold] :smile: \x1b[31m")
    assert out.getvalue() == "[bold]x[/bold] :smile: \N{REPLACEMENT CHARACTER}[31m\n"


# ---- The live view ---------------------------------------------------------------------------------


def rendered(display: Display) -> str:
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
    console.print(display)
    return console.export_text()


def test_the_live_view_shows_where_the_run_is() -> None:
    display = Display(quiet=True)
    display.start("oaif", Path("runs/x"))
    display.expect(20)
    display.step(6)
    display.working("sample", 1234.5)
    display.metrics({**EVERY, "step": 7}, [group("a completion", "a prompt", reward=-0.25)])
    text = rendered(display)
    for shown in (
        "oaif  runs/x",
        "step 7/20",
        "sampling 1,234 tokens/s",
        "reward 0.500",
        "KL (nats) 1.50",
        "accuracy 50%",
        "a prompt",
        "a completion",
        "reward -0.25",
    ):
        assert shown in text


def test_the_live_view_before_the_first_step() -> None:
    display = Display(quiet=True)
    display.start("dpo", Path("runs/x"))
    assert "step 0/0" in rendered(display)
    assert "starting" in rendered(display)


def test_a_sample_without_a_usable_reward_has_none_shown() -> None:
    display = Display(quiet=True)
    display.metrics({"step": 1, "step_time": 0.0}, [group("a completion", reward=None)])
    assert "a completion" in rendered(display)
    assert "reward" not in rendered(display)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.0, "00:00"), (61.9, "01:01"), (3725.0, "62:05"), (90_000.0, "1500:00")]
)
def test_time_does_not_wrap_after_an_hour(
    monkeypatch: pytest.MonkeyPatch, seconds: float, shown: str
) -> None:
    now = [5.0]
    monkeypatch.setattr("palate.run.display.time", SimpleNamespace(monotonic=lambda: now[0]))
    display = Display(quiet=True)
    display.start("dpo", Path("runs/x"))
    now[0] += seconds
    assert f" {shown} " in rendered(display)


def test_model_text_is_no_markup() -> None:
    display = Display(quiet=True)
    display.metrics({"step": 1, "step_time": 0.0}, [group("[red]a[/red] :smile: [/]")])
    assert "[red]a[/red] :smile: [/]" in rendered(display)


def test_model_text_cannot_drive_the_terminal() -> None:
    # Through the real live display, byte for byte as the terminal would get it.
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=True, width=100, legacy_windows=False))
    display.start("oaif", Path("runs/x"))
    display.metrics({"step": 1, "step_time": 0.0}, [group(ESCAPES + BIDI + " unseen", prompt=f"P{ESCAPES}")])
    assert display._live is not None
    display._live.refresh()
    display.stop()
    shown = out.getvalue()
    assert "unseen" in shown
    assert "\x1b[2J" not in shown
    assert "\x1b[31m" not in shown
    assert not {"\x07", "\x08", "\x7f", "\x85", "\x9b", "\x1b]"} & set(shown)
    assert "title" in shown  # as harmless text
    assert "\x1b]0" not in shown
    assert not set(BIDI) & set(shown)


def test_the_live_view_leaves_the_terminal_as_it_was() -> None:
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=True, width=100))
    display.start("oaif", Path("runs/x"))
    display.stop()
    display.stop()  # an error may have stopped it already
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1  # the cursor is back


# ---- plain -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "a b", "one\ntwo", "naïve 日本語 שלום 🙂", "<b>[x]</b> \\ {}"])
def test_text_stays_as_it_is(text: str) -> None:
    assert plain(text) == text


@pytest.mark.parametrize("character", [*"\x1b\a\b\r\v\f\x00\x7f\x80\x85\x9b"])
def test_control_characters_are_replaced(character: str) -> None:
    assert plain(f"a{character}b") == "a\N{REPLACEMENT CHARACTER}b"


@pytest.mark.parametrize("character", [*BIDI, "\u200e", "\u200f", "\u061c", "\u2028", "\u2029", "\ufeff"])
def test_characters_that_reorder_or_break_lines_unseen_are_replaced(character: str) -> None:
    # With these a completion could show a reader other text than the reward has read.
    assert plain(f"a{character}b") == "a\N{REPLACEMENT CHARACTER}b"


def test_half_a_surrogate_pair_can_be_written() -> None:
    assert plain("a\ud83db").encode() == "a\N{REPLACEMENT CHARACTER}b".encode()
