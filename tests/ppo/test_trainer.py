"""What the trainer leaves out of a run that needs no rollout server, and how it shares a batch out to ranks."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import transfer_queue
from conftest import Tiny, main_ppo_config
from transfer_queue import KVBatchMeta

from hpd_verl.data import fields
from hpd_verl.ppo.teacher_columns import TeacherColumns
from hpd_verl.ppo.trainer import HPDTrainer


def trainer_of(tiny: Tiny, *overrides: str) -> HPDTrainer:
    batch = ["data.train_batch_size=8", f"trainer.default_local_dir={tiny.folder / 'checkpoints'}"]
    return HPDTrainer(main_ppo_config(*tiny.main_ppo, *batch, *overrides))


@pytest.mark.parametrize(("fraction", "workers"), [(0.0, 0), (0.5, 1)])
def test_reward_workers_only_beside_a_rollout_server(tiny: Tiny, fraction: float, workers: int) -> None:
    """Demonstrations earn no reward, so no process waits to give one."""
    trainer = trainer_of(tiny, f"algorithm.hpd.on_policy_fraction={fraction}")
    assert trainer.serves_rollouts == (workers > 0)
    assert trainer.config.reward.num_workers == workers


@pytest.mark.parametrize(
    "bad", ["algorithm.hpd.temperature=0", "data.train_batch_size=65", "actor_rollout_ref.ref.model.path=/none"]
)
def test_without_the_driver_the_trainer_checks(tiny: Tiny, bad: str, caplog: pytest.LogCaptureFixture) -> None:
    """Settings, data and models; a run through ``algorithm=hpd`` has been checked in its driver."""
    with caplog.at_level("INFO"), pytest.raises(ValueError, match=f"^{re.escape(bad)}: "):
        trainer_of(tiny, bad)
    assert "the trainer checks settings, data and models" in caplog.text


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_each_update_out(tiny: Tiny, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update takes the next rows of the batch on any number of ranks, whichever came first out of the queue."""
    batch = ("data.train_batch_size=12", "actor_rollout_ref.actor.ppo_mini_batch_size=4")
    trainer = trainer_of(tiny, *batch, f"trainer.n_gpus_per_node={ranks}")
    written: dict[str, Any] = {}
    monkeypatch.setattr(
        transfer_queue, "kv_batch_put", lambda keys, partition_id, fields: written.update(keys=keys, fields=fields)
    )
    trainer.actor_rollout_wg = SimpleNamespace(_dispatch_info={"actor": list(range(ranks))})
    trainer.tokenizer = SimpleNamespace(eos_token_id=1)
    trainer.teacher_columns = TeacherColumns.of(trainer.config, trainer.hpd, trainer.student)
    trainer.global_steps, trainer.on_policy_uids, trainer.batch_counts = 1, set(), {}
    order = [7, 3, 11, 0, 5, 9, 1, 10, 2, 8, 4, 6]
    lengths = [9, 1, 30, 4, 2, 2, 25, 8, 3, 90, 5, 7]
    meta = KVBatchMeta(
        keys=[f"1r{row}_0_0" for row in order],
        tags=[{"seq_len": lengths[row]} for row in order],
        partition_id="train",
    )
    metrics: dict[str, Any] = {}
    shared = trainer._balance_batch(meta, metrics=metrics)
    rows = [int(key.split("_")[0].split("r")[1]) for key in shared.keys]
    of_rank = [rows[rank * 12 // ranks : (rank + 1) * 12 // ranks] for rank in range(ranks)]
    share = 4 // ranks
    for update in range(3):
        taken = [row for each in of_rank for row in each[update * share : (update + 1) * share]]
        assert sorted(taken) == list(range(4 * update, 4 * update + 4))
    assert written["keys"] == shared.keys
    assert written["fields"][fields.ROW].flatten().tolist() == rows, "the number of a row is its place in the batch"
    tokens = [sum(lengths[row] for row in each) for each in of_rank]
    assert metrics["global_seqlen/balanced_max"] == max(tokens)
