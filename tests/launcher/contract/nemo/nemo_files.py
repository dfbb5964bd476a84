"""NeMo 1.x configs in the shapes that trlx's NeMo trainers were run at."""

from __future__ import annotations

from typing import Any

HEAD = """\
name: megatron_gpt
restore_from_path: null

trainer:
  devices: 8
  num_nodes: {nodes}
  accelerator: gpu
  precision: bf16
  logger: False
  enable_checkpointing: False
  max_epochs: -1
  max_steps: 200
  log_every_n_steps: 1
  val_check_interval: 20
  limit_val_batches: 2
  accumulate_grad_batches: 1
  gradient_clip_val: 1.0

exp_manager:
  explicit_log_dir: logs/{name}
  create_wandb_logger: False
  resume_if_exists: True
  create_checkpoint_callback: False
  checkpoint_callback_params:
    monitor: reduced_train_loss
    save_top_k: 1
    model_parallel_size: ${{multiply:${{model.tensor_model_parallel_size}}, ${{model.pipeline_model_parallel_size}}}}

model:
  micro_batch_size: {micro_batch}
  global_batch_size: {global_batch}
  tensor_model_parallel_size: {tp}
  pipeline_model_parallel_size: {pp}
  encoder_seq_length: {seq_length}
  max_position_embeddings: 2048
  num_layers: {layers}
  hidden_size: {hidden}
  ffn_hidden_size: {ffn}
  num_attention_heads: {heads}
  make_vocab_size_divisible_by: 128
  sequence_parallel: True
  activations_checkpoint_granularity: selective
  seed: 1234
"""

GPT = """\
  hidden_dropout: 0.1
  layernorm_epsilon: 1e-5
  tokenizer: {library: megatron, type: GPT2BPETokenizer, vocab_file: null}
"""

LLAMA = """\
  hidden_dropout: 0.
  attention_dropout: 0.
  layernorm_epsilon: 1e-6
  padded_vocab_size: 32000
  normalization: rmsnorm
  bias: False
  activation: swiglu
  position_embedding_type: rope
  rotary_percentage: 1
  share_embeddings_and_output_weights: false
  tokenizer: {library: huggingface, type: some/llama}
"""

TAIL = """\
  data:
    data_prefix: [{dataset: hh}]
    seq_length: ${model.encoder_seq_length}
    reset_position_ids: False
    eod_mask_loss: False
  optim:
    name: distributed_fused_adam
    lr: 5.0e-5
    weight_decay: 1.0e-6
    betas: [0.9, 0.95]
    sched:
      name: CosineAnnealing
      warmup_steps: 20
      min_lr: 5.0e-6
"""

FOUR_TIMES = "${multiply:4, ${.hidden_size}}"

SHAPES: dict[str, dict[str, Any]] = {
    "gpt-1.3b": {
        "nodes": 1, "tp": 1, "pp": 1, "micro_batch": 32, "global_batch": 256, "seq_length": 2048,
        "layers": 24, "hidden": 2048, "ffn": 3072, "heads": 16,
    },
    "gpt-20b": {
        "nodes": 4, "tp": 4, "pp": 1, "micro_batch": 4, "global_batch": 256, "seq_length": 1024,
        "layers": 44, "hidden": 6144, "ffn": FOUR_TIMES, "heads": 48,
    },
    "gpt-65b": {
        "nodes": 16, "tp": 8, "pp": 4, "micro_batch": 8, "global_batch": 128, "seq_length": 2048,
        "layers": 80, "hidden": 8192, "ffn": FOUR_TIMES, "heads": 128,
    },
    "llama2-7b": {
        "nodes": 4, "tp": 4, "pp": 1, "micro_batch": 1, "global_batch": 32, "seq_length": 2048,
        "layers": 32, "hidden": 4096, "ffn": 11008, "heads": 32,
    },
}  # fmt: skip
"""Name -> nodes of 8 GPUs, layout, batch and sizes."""


def nemo_config(name: str, **changes: Any) -> str:
    """Return the YAML of one of `SHAPES`, with other sizes where `changes` give some."""
    head = HEAD.format(**{"name": name, **SHAPES[name], **changes})
    return head + (LLAMA if name.startswith("llama") else GPT) + TAIL
