"""Rules for NeMo's section `model`, optimizer left out: topology, adapters, data."""

from __future__ import annotations

from launcher.contract.nemo.entries import Entries, number_of, value_of, whole_number_of
from launcher.contract.nemo.rule import Refused, Translation

_LORA_TARGETS = {
    "attention_qkv": ["q_proj", "k_proj", "v_proj"],
    "attention_dense": ["o_proj"],
    "mlp_fc1": ["gate_proj", "up_proj"],
    "mlp_fc2": ["down_proj"],
}
"""NeMo's name of a linear layer -> the Hugging Face names of its parts."""


def sequence_parallel(value: object, entries: Entries) -> Translation:
    """Translate sequence parallelism, which NeMo ignores at tensor parallel 1."""
    if value and value_of(entries, "model.tensor_model_parallel_size", 1) == 1:
        return Translation(note="has no effect at tensor parallel 1")
    return Translation({"topology.sequence_parallel": bool(value)})


def recompute(value: object, entries: Entries) -> Translation:
    """Translate which activations are recomputed."""
    if value not in (None, "selective", "full"):
        raise Refused(f"{value!r} is not selective, full or null")
    return Translation({"train.recompute": value or "none"})


def recomputed_layers(value: object, entries: Entries) -> Translation:
    """Translate how many layers of each pipeline stage are recomputed, which NeMo reads with method `block` alone."""
    in_blocks = value_of(entries, "model.activations_checkpoint_method") == "block"
    if value is None or not in_blocks or value_of(entries, "model.activations_checkpoint_granularity") != "full":
        return Translation(note="`full` recomputes every layer, unless the method is `block`")
    layers = whole_number_of(entries, "model.activations_checkpoint_num_layers", 1)
    return Translation({"train.recompute_layers": layers})


def sequence_length(value: object, entries: Entries) -> Translation:
    """Translate the longest example in tokens, unless the training data have a limit of their own."""
    if value_of(entries, "model.data.train_ds.max_seq_length"):
        return Translation(note="model.data.train_ds.max_seq_length counts")
    return Translation({} if value is None else {"data.seq_length": value})


def answer_only(value: object, entries: Entries) -> Translation:
    """Translate which tokens are trained."""
    return Translation({"data.loss_on": "assistant" if value else "all"})


def peft(value: object, entries: Entries) -> Translation:
    """Translate LoRA with its settings, or the training of all weights."""
    if value in (None, "none"):
        return Translation(note="all weights are trained")
    if value != "lora":
        raise Refused(f"{value!r} is not supported; lora is, and none")
    section = "model.peft.lora_tuning."
    rank = whole_number_of(entries, f"{section}adapter_dim", 32)
    listed = value_of(entries, f"{section}target_modules", ["attention_qkv"])
    modules = [str(name) for name in listed] if isinstance(listed, list) else [str(listed)]
    unknown = [name for name in modules if name not in _LORA_TARGETS]
    if unknown:
        raise Refused(f"target_modules {unknown}: not one of {', '.join(_LORA_TARGETS)}")
    if value_of(entries, f"{section}layer_selection") is not None:
        raise Refused("layer_selection is not supported: adapters are in all layers")
    settings = {
        "model.lora.rank": rank,
        "model.lora.alpha": number_of(entries, f"{section}alpha", rank),
        "model.lora.dropout": number_of(entries, f"{section}adapter_dropout", 0.0),
        "model.lora.targets": [target for name in modules for target in _LORA_TARGETS[name]],
    }
    return Translation(settings, "q, k and v have an adapter each here; NeMo's share their first matrix")


def prompt_template(value: object, entries: Entries) -> Translation:
    """Translate the two columns of a prompt template. Text around them would be lost, so it is refused."""
    label = value_of(entries, "model.data.train_ds.label_key", "output")
    context = value_of(entries, "model.data.train_ds.context_key", "input")
    if value is not None and str(value).replace(" ", "") != f"{{{context}}}{{{label}}}":
        raise Refused(
            f"{value!r} has text of its own; write it as a chat template and name it by data.chat_template, "
            f"with data.columns={{prompt: ..., completion: {label}}}"
        )
    columns = {"prompt": context, "completion": label}
    settings = {"data.format": "prompt_completion", "data.columns": columns, "data.chat_template": "none"}
    return Translation(
        settings, "prompt and completion are joined as they are; a space between them must be in the data"
    )


def truncation(value: object, entries: Entries) -> Translation:
    """Translate the end at which long examples are cut: of the prompt alone, where a field to be cut is named."""
    if value not in (None, "left", "right"):
        raise Refused(f"{value!r} is not left or right")
    settings: dict[str, object] = {"data.length_policy": f"truncate_{value or 'right'}"}
    field = value_of(entries, "model.data.train_ds.truncation_field")
    if value == "left" or not field:
        return Translation(settings)
    settings["data.max_lost_percent"] = 0
    return Translation(
        settings,
        f"NeMo cuts {field} and keeps the whole answer; here the answer would be cut, so data with longer examples are "
        "refused: raise data.seq_length, or take data.length_policy drop or truncate_left",
    )


def probabilities(value: object, entries: Entries) -> Translation:
    """Refuse shares of several files, not that of a single one, which says nothing."""
    if value is None or (isinstance(value, list) and len(value) == 1):
        return Translation(note="of a single file")
    raise Refused(f"{value!r} is not supported: give several data.sources with weights instead")
