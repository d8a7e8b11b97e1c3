from collections.abc import Callable, Sequence

import pytest
from torch import Tensor

from palate.learn import Learner, Objective
from palate.types import Record


@pytest.fixture
def gradients_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Tensor]]:
    """What an update would apply, per trained parameter; the learner stays as it is."""

    def gradients(
        learner: Learner, records: Sequence[Record], objective: Objective[Record]
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def step() -> float:
            names = [name for name, _ in learner.model.trained()]
            given = zip(names, learner.optimizer.gradients(), strict=True)
            found.update({name: g.clone() for name, g in given if g is not None})
            learner.optimizer.drop_gradients()
            return 0.0

        with monkeypatch.context() as patch:
            patch.setattr(learner.optimizer, "step", step)
            learner.update(records, objective)
        assert found
        return found

    return gradients


@pytest.fixture
def micro_batches_change_nothing(
    gradients_of: Callable[..., dict[str, Tensor]], same_gradients: Callable[..., None]
) -> Callable[..., None]:
    """Checks that gradients are the same however an update is cut; learners come from `make(budget)`."""

    def check(
        make: Callable[[int], Learner],
        records_of: Callable[[Learner], Sequence[Record]],
        objective: Objective[Record],
    ) -> None:
        found = []
        for budget in (1, 100, 100_000):
            learner = make(budget)
            found.append(gradients_of(learner, records_of(learner), objective))
        for other in found[1:]:
            same_gradients(other, found[0])
        assert max(float(g.abs().max()) for g in found[0].values()) > 1e-3

    return check
