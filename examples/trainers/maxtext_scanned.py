"""Fine-tunes a MaxText model, its layers scanned, by MaxText's own SFT, and saves it for PEFT.

    python examples/trainers/maxtext_scanned.py FOLDER [steps=20 lora.lora_weight_qtype=int8 …]

A tiny model with random weights learns MaxText's synthetic data. For a real one leave TINY out, and
give `model_name`, `load_parameters_path` and the data set, as for MaxText's own LoRA.

It takes about a minute on two cores. It needs the trainer's packages: docs/trainers.md.
"""

import sys
from pathlib import Path

from maxtext.configs import pyconfig
from maxtext.trainers.post_train.sft import train_sft
from maxtext.utils import lora_utils
from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR

import loha_jax
from loha_jax import interop
from loha_jax.qwix import LoHaProvider

TINY = """
    base_emb_dim=64 base_mlp_dim=128 base_num_query_heads=4 base_num_kv_heads=4 head_dim=16
    base_num_decoder_layers=2 vocab_size=256 max_target_length=16 per_device_batch_size=4
    dtype=float32 attention=dot_product dataset_type=synthetic packing=false hardware=cpu
    skip_jax_distributed_system=true enable_goodput_recording=false log_config=false
    sharding_tolerance=1.0
"""
LOHA = "lora.enable_lora=true lora.lora_rank=4 lora.lora_alpha=8.0"
RUN = "run_name=loha steps=20 learning_rate=1e-2 eval_interval=-1"


def provider(config):
    """Return LoHa for MaxText's settings of LoRA: the same modules, rank, alpha and base."""
    path, lora = lora_utils._get_lora_module_path(config), config.lora
    base = {"weight_qtype": lora.lora_weight_qtype, "tile_size": lora.lora_tile_size}
    return LoHaProvider(module_path=path, rank=lora.lora_rank, alpha=lora.lora_alpha, **base)


lora_utils._build_lora_provider = provider  # MaxText has no setting for it


def train(folder, settings):
    """Return MaxText's trainer and mesh after the training."""
    sft = Path(MAXTEXT_CONFIGS_DIR) / "post_train/sft.yml"
    where = f"base_output_directory={folder}"  # a second run resumes from the checkpoints in it
    words = f"{TINY} {LOHA} {RUN}".split()
    config = pyconfig.initialize(["", str(sft), where, *words, *settings])
    trainer, mesh = train_sft.setup_trainer_state(config)
    return train_sft.train_model(config, trainer, mesh), mesh


if __name__ == "__main__":
    trainer, _ = train(sys.argv[1], sys.argv[2:])
    print(loha_jax.summary(trainer.model))
    interop.save_peft(Path(sys.argv[1]) / "adapter", trainer.model)
