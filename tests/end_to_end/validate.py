"""Run by torchrun: the lean trainer's validation under every aggregation and its order of the rows, as json."""

import json
import sys
from typing import Any

import torch.distributed
from conftest import sft_config
from verl.utils.device import auto_set_device
from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group

from hpd_verl.sft.trainer import HPDSFTTrainer

AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]


def main(overrides: list[str]) -> None:
    config = sft_config(*overrides)
    auto_set_device(config)
    initialize_global_process_group()
    trainer = HPDSFTTrainer(config)
    found: dict[str, Any] = {}
    for dynamic in (True, False):
        config.data.use_dynamic_bsz = dynamic
        for batch_size in (2, 4):
            config.data.train_batch_size = batch_size * torch.distributed.get_world_size()
            trainer._build_dataloader()
            for mode in AGGREGATIONS:
                trainer.one_pass.loss.loss_agg_mode = mode
                found[f"{mode}, {batch_size}, {dynamic}"] = trainer._validate(1)
    for seed in (1, 2):
        config.data.seed = seed
        trainer._build_dataloader()
        found[f"order {seed}"] = list(trainer.train_sampler)
    if torch.distributed.get_rank() == 0:
        print("RESULT " + json.dumps(found))
    destroy_global_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
