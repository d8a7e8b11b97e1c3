from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError

from palate.errors import AGAIN, RunError
from palate.learn import Pairwise, Policy
from palate.losses import PAIR_LOSSES
from palate.model import LoadedModel
from palate.run.checkpoint import Position
from palate.run.checkpoints import Checkpoints
from palate.run.moves import NOTE
from palate.types import Comparison, Prompt

# Asked by peft of every network.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

LORA = {"lora": True, "lora_rank": 2, "fast": False}
FULL = {"lora": False, "fast": False}

MakePolicy = Callable[..., Policy]


def learn(policy: Policy, steps: int = 1) -> None:
    pair = policy.model.codec.pair(Comparison(Prompt("Q"), "yes", "no"))
    for _ in range(steps):
        policy.update([pair], Pairwise(PAIR_LOSSES["slic_rank"], strength=5.0))


def at(step: int, *, stage: int = 0, before: int = 0, ended: bool = False) -> Position:
    return Position(stage, step, before, metrics=before + step, ended=ended)


def opened(directory: Path, *, run: str = "this", keep: int = 2) -> Checkpoints:
    return Checkpoints(directory, run, keep=keep)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def policy(make_policy: MakePolicy) -> Policy:
    return make_policy(model=LORA)


@pytest.fixture
def saved(policy: Policy, tmp_path: Path) -> Path:
    """A directory with the checkpoints of steps 1 and 2."""
    directory = tmp_path / "checkpoints"
    checkpoints = opened(directory)
    for step in (1, 2):
        learn(policy)
        checkpoints.save(at(step), policy)
    return directory


# ---- Written and read ------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [LORA, FULL], ids=["lora", "full"])
def test_a_checkpoint(make_policy: MakePolicy, model: dict[str, Any], tmp_path: Path, same: Any) -> None:
    policy, fresh = make_policy(model=model), make_policy(model=model)
    learn(policy, 3)
    written = opened(tmp_path / "c")
    assert written.latest is None
    path = written.save(at(3, ended=True), policy)
    assert (path, names(tmp_path / "c")) == (tmp_path / "c" / "step-3", ["step-3"])
    assert not list(path.rglob(".*"))
    found = opened(tmp_path / "c")
    assert found.latest is not None
    assert written.latest is not None
    assert found.latest == written.latest
    assert set(found.latest.files) == set(names(path)) - {NOTE}
    assert not same(policy, fresh)
    assert found.restore(0, fresh) == at(3, ended=True)
    assert same(policy, fresh)
    # And they learn on alike: moments, counts and schedule are there too.
    learn(policy, 2)
    learn(fresh, 2)
    assert same(policy, fresh)


def test_without_a_checkpoint_nothing_is_restored(policy: Policy, tmp_path: Path) -> None:
    assert opened(tmp_path / "c").restore(0, policy) is None
    assert not (tmp_path / "c").exists()
    assert policy.version == 0


def test_the_one_of_most_steps_is_the_latest(policy: Policy, tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, keep=20)
    for step in (9, 10, 100):  # by number, not by name
        checkpoints.save(at(step), policy)
    for found in (checkpoints, opened(tmp_path)):
        assert found.latest is not None
        assert found.latest.position.steps == 100


def test_one_that_is_there_is_not_written_again(
    saved: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "save", None)
    assert opened(saved).save(at(2), policy) == saved / "step-2"


def test_one_of_another_position_takes_its_place(saved: Path, policy: Policy) -> None:
    learn(policy)
    opened(saved).save(at(2, ended=True), policy)
    latest = opened(saved).latest
    assert latest is not None
    assert (latest.position, latest.learner["version"]) == (at(2, ended=True), 3)
    assert names(saved) == ["step-1", "step-2"]


@pytest.mark.parametrize("keep", [1, 2])
def test_old_ones_go_and_ends_of_stages_stay(policy: Policy, tmp_path: Path, keep: int) -> None:
    for step in range(1, 5):
        opened(tmp_path, keep=keep).save(at(step, ended=step == 4), policy)
    for step in range(1, 7):
        opened(tmp_path, keep=keep).save(at(step, stage=1, before=4), policy)
    assert names(tmp_path) == sorted(f"step-{n}" for n in (4, *range(11 - keep, 11)))


def test_each_stage_is_restored_from_its_own(
    make_policy: MakePolicy, policy: Policy, tmp_path: Path, same: Any
) -> None:
    first, second, fresh = policy, make_policy(model=FULL), make_policy(model=LORA)
    learn(first, 2)
    learn(second, 1)
    opened(tmp_path).save(at(2, ended=True), first)
    opened(tmp_path).save(at(1, stage=1, before=2), second)
    found = opened(tmp_path)
    assert found.restore(0, fresh) == at(2, ended=True)
    assert same(first, fresh)
    other = make_policy(model=FULL)
    position = found.restore(1, other)
    assert position is not None
    assert position.steps == 3
    assert same(second, other)
    assert found.restore(2, fresh) is None


def test_the_end_of_a_stage_that_was_taken_away_is_missed(policy: Policy, tmp_path: Path) -> None:
    opened(tmp_path).save(at(2, ended=True), policy)
    opened(tmp_path).save(at(1, stage=1, before=2), policy)
    shutil.rmtree(tmp_path / "step-2")
    with pytest.raises(RunError, match="lacks the checkpoint at the end of stage 1; restore it"):
        opened(tmp_path).restore(0, policy)


@pytest.mark.parametrize("others", [{**LORA, "lora_rank": 4}, FULL], ids=["rank", "full"])
def test_the_state_of_another_model(make_policy: MakePolicy, saved: Path, others: dict[str, Any]) -> None:
    other = make_policy(model=others)
    before = [p.detach().clone() for _, p in other.model.trained()]
    with pytest.raises(RunError, match=r"step-2' does not fit the model: .* differs; expected the state of "):
        opened(saved).restore(0, other)
    assert all((a == p).all() for a, (_, p) in zip(before, other.model.trained(), strict=True))
    assert other.version == 0


# ---- Damage ----------------------------------------------------------------------------------------


def damages(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """What may have become of a file: flipped somewhere, shorter, longer, empty, gone."""
    data = path.read_bytes()
    for place in {0, len(data) // 2, len(data) - 1}:
        yield f"byte {place}", data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    yield from (("cut", data[:-1]), ("longer", data + b"\n"), ("empty", b""), ("gone", None))


def test_any_damage_to_any_file_is_found(saved: Path) -> None:
    checked = 0
    for path in sorted((saved / "step-2").iterdir()):
        if path.name == NOTE:
            continue
        whole = path.read_bytes()
        for _, data in damages(path):
            path.unlink() if data is None else path.write_bytes(data)
            what = "is missing" if data is None else "has changed"
            told = rf"step-2' is damaged: {path.name} {what}; .* delete that directory"
            with pytest.raises(RunError, match=told):
                opened(saved)
            path.write_bytes(whole)
            checked += 1
    assert checked > 30
    opened(saved)


def test_an_older_one_is_checked_before_it_is_used(saved: Path, policy: Policy) -> None:
    state = saved / "step-1" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"\x01")
    opened(saved)  # the latest is whole
    shutil.rmtree(saved / "step-2")  # as one is told to do with a damaged one
    with pytest.raises(RunError, match=r"step-1' is damaged: state\.safetensors has changed"):
        opened(saved)


def test_any_damage_to_the_note_is_found(saved: Path) -> None:
    # It says where the run is: a bit of it wrong, and steps are left out or done twice.
    note = saved / "step-2" / NOTE
    whole = note.read_bytes()
    meaning = json.loads(whole)
    missed = []
    for place in range(0, len(whole), 3):
        note.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            opened(saved)
        except RunError:
            continue
        if json.loads(note.read_bytes()) != meaning:
            missed.append(whole[max(0, place - 20) : place + 1])
    assert missed == []


GARBAGE = {
    "empty": "",
    "cut": '{"run": "this", "posi',
    "a list": "[]",
    "null": "null",
    "a number": "3",
    "nothing in it": "{}",
    "bytes": b"\xff\xfe\x00",
    "no position": '{"run": "this", "learner": {}, "files": {}}',
    "another position": '{"run": "this", "position": {"where": 3}, "learner": {}, "files": {}}',
    "files of no kind": '{"run": "this", "position": POSITION, "learner": LEARNER, "files": [1, 2]}',
    "a size of no kind": '{"run": "this", "position": POSITION, "learner": LEARNER, "files": {"a": "b"}}',
    "words for numbers": (
        '{"run": "this", "position": {"stage": "0", "step": "2", "steps_before": "0", "metrics": "2", '
        '"ended": "no"}, "learner": LEARNER, "files": {}}'
    ),
    "no numbers of the learner": '{"run": "this", "position": POSITION, "learner": {}, "files": {}}',
    "no files": '{"run": "this", "position": POSITION, "learner": LEARNER, "files": {}}',
}


@pytest.mark.parametrize("what", GARBAGE)
def test_a_note_that_is_garbage_is_told(saved: Path, what: str) -> None:
    given = GARBAGE[what]
    note = saved / "step-2" / NOTE
    if isinstance(given, bytes):
        note.write_bytes(given)
    else:
        whole = json.loads(note.read_text())
        for name in ("position", "learner"):
            given = given.replace(name.upper(), json.dumps(whole[name]))
        note.write_text(given)
    with pytest.raises(RunError, match=r"step-2' is damaged: .* delete that directory"):
        opened(saved)


def test_a_directory_without_a_note_is_not_ours(saved: Path, tiny: str) -> None:
    shutil.copytree(tiny, saved / "step-3")  # a model that was saved by hand
    with pytest.raises(
        RunError, match=r"step-3' is incomplete or not from Palate: it has no checkpoint\.json; move it"
    ):
        opened(saved)
    assert (saved / "step-3" / "model.safetensors").is_file()


def test_a_checkpoint_of_another_run_is_refused(saved: Path) -> None:
    with pytest.raises(RunError, match="step-2' belongs to another run; move it away to resume without it"):
        opened(saved, run="that")


# ---- Cut off in the middle -------------------------------------------------------------------------


def test_a_kill_at_any_moment_of_a_save_leaves_one_to_go_on_from(
    saved: Path, policy: Policy, make_policy: MakePolicy, tmp_path: Path, dies: Callable[..., bool]
) -> None:
    learn(policy)
    fresh = make_policy(model=LORA)
    found: list[int] = []
    for n in range(1, 100):
        directory = tmp_path / "copy"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(saved, directory)
        checkpoints = opened(directory, keep=1)
        dead = dies(lambda checkpoints=checkpoints: checkpoints.save(at(3), policy), directory, n)
        after = opened(directory, keep=1)
        position = after.restore(0, fresh)
        assert position is not None
        assert fresh.version == position.step
        assert not list(directory.glob(".*"))
        found.append(position.step)
        if not dead:
            break
    assert len(found) > 20
    assert found == sorted(found)  # the old one, until all of the new one is there
    assert {found[0], found[-1]} == {2, 3}


def test_a_kill_while_one_is_written_anew_leaves_the_old_or_the_new(
    saved: Path, policy: Policy, tmp_path: Path, dies: Callable[..., bool]
) -> None:
    for n in range(1, 20):
        directory = tmp_path / "copy"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(saved, directory)
        checkpoints = opened(directory)
        events = ("os.rename", "os.rmdir")
        dead = dies(
            lambda checkpoints=checkpoints: checkpoints.save(at(2, ended=True), policy), directory, n, events
        )
        latest = opened(directory).latest
        assert latest is not None
        assert latest.position.step == 2, f"lost at file operation {n}"
        if not dead:
            break


def test_what_a_dead_process_left_is_cleared_away(saved: Path) -> None:
    for name in (".step-3.4242", ".step-1.old"):
        (saved / name / "deep").mkdir(parents=True)
        (saved / name / "deep" / "model.safetensors").write_text("half")
    opened(saved)
    assert names(saved) == ["step-1", "step-2"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), RunError),
        (SafetensorError("No space left on device (os error 28)"), RunError),  # what safetensors makes of it
        (ValueError("a bug"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_save_that_fails_leaves_what_was_there(
    saved: Path,
    policy: Policy,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    raised: type[BaseException],
) -> None:
    def fails(model: LoadedModel, directory: Path) -> None:
        (directory / "model.safetensors").write_text("half")
        raise error

    monkeypatch.setattr(LoadedModel, "save", fails)
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    checkpoints = opened(saved)
    for position in (at(2, ended=True), at(3)):
        with pytest.raises(raised) as caught:
            checkpoints.save(position, policy)
        if raised is RunError:
            assert "cannot be written: No space left on device" in str(caught.value)
            assert f"everything up to step 2 is safe: free some space and {AGAIN}" in str(caught.value)
        assert checkpoints.latest == opened(saved).latest
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before


def test_a_full_disk_is_told_before_anything_is_written(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 32 << 20  # what must stay for the journal alone
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(
        RunError, match=r"the disk is full: .*step-1' needs 34 MB and 34 MB are free; journal"
    ):
        opened(tmp_path).save(at(1), policy)
    assert names(tmp_path) == []
    monkeypatch.undo()
    checkpoints = opened(tmp_path)
    checkpoints.save(at(1), policy)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(RunError, match="everything up to step 1 is safe: free some space and run the same"):
        checkpoints.save(at(2), policy)
    assert names(tmp_path) == ["step-1"]


def test_a_directory_in_which_nothing_can_be_made(policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(RunError, match="cannot be written"):
        opened(tmp_path / "checkpoints").save(at(1), policy)
