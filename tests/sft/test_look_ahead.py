"""Batches that are taken out early: none is lost or seen twice by a run that goes on from the loader's state."""

import copy

import pytest
from torchdata.stateful_dataloader import StatefulDataLoader

from hpd_verl.sft.demonstrations import LookAhead


def loader(workers: int) -> StatefulDataLoader:
    return StatefulDataLoader(list(range(12)), batch_size=3, num_workers=workers, collate_fn=list)


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_goes_on_after_what_was_trained(looks: bool, workers: int) -> None:
    """Stopped before the first batch, in an epoch, at its end and in the next, with the last batch not trained on."""
    batches = [list(range(start, start + 3)) for start in range(0, 12, 3)]
    for trained in (0, 1, 3, 4, 5):
        first, seen = LookAhead(loader(workers), looks), 0
        state = None
        while state is None:
            for number, (batch, following) in enumerate(first.pairs()):
                assert batch == batches[number]
                assert following == (batches[number + 1] if looks and number < 3 else None)
                if seen == trained:
                    state = copy.deepcopy(first.state_dict())
                    break
                first.trained()
                seen += 1
        second = LookAhead(loader(workers), looks)
        second.load_state_dict(state)
        left = [batch for batch, _ in second.pairs()]
        # At an epoch's end the state is that, or the start of the next.
        assert left in ([batches[trained % 4 :]] if trained != 4 else [[], batches]), trained
