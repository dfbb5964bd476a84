"""Which kernels a run computes with: decided once, from the config and the model, and passed to whatever needs it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace

from launcher.contract.cuda_graphs import no_graphs, no_graphs_because, uses_cuda_graphs
from launcher.contract.errors import ModelError
from launcher.contract.head_sizes import LARGEST_FLASH_HEAD
from launcher.contract.spec import RunSpec
from sft.kernels import attention, gated_delta
from sft.models.architecture import Architecture, DenseMLP, Experts


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """The kernels of a run."""

    fused: bool
    """Whether loss, weight gradients, embedding lookup and optimizer use fused kernels."""
    plain_layers_because: str | None = None
    """With `fused`: why the decoder layers are plain all the same; None where they are fused, too."""
    attention: attention.Kernel = "flash2"
    """The kernel for rows whose sequences are given by offsets, in fused layers on a GPU."""
    attention_text: str = "torch's"
    """What to call the attention kernel."""
    linear_attention: gated_delta.Kernel = "torch"
    """The kernels of linear attention."""
    linear_attention_text: str | None = None
    """What to call them; None where the model has none."""
    precision: str = "bf16"
    graphs: bool = False
    """Whether the layers' kernels are launched as CUDA graphs."""

    @property
    def fused_layers(self) -> bool:
        """Whether decoder layers are fused."""
        return self.fused and self.plain_layers_because is None

    def describe(self) -> str:
        """Return one line for people."""
        products = f"products in {self.precision}"
        if self.linear_attention_text is not None:
            products = f"linear attention {self.linear_attention_text}, {products}"
        if not self.fused:
            return f"kernels: plain, {products}"
        if self.plain_layers_because is not None:
            return f"kernels: fused loss and optimizer, plain layers ({self.plain_layers_because}), {products}"
        launched = ", layers launched as CUDA graphs" if self.graphs else ""
        return f"kernels: fused, attention {self.attention_text}, {products}{launched}"


def choose_kernels(spec: RunSpec, architecture: Architecture, *, on_gpu: bool) -> Kernels:
    """Return the kernels that the config means for this model, or raise ModelError for one that cannot be used."""
    fused = spec.train.kernels == "fused"
    if spec.train.kernels == "auto":
        fused = on_gpu and importlib.util.find_spec("triton") is not None
    precision = ", ".join(_precision(spec, architecture))
    because = _unfused_part(spec, architecture)
    linear, linear_text = _linear_attention(spec, architecture, on_gpu=on_gpu)
    common = Kernels(fused=fused, precision=precision, linear_attention=linear, linear_attention_text=linear_text)
    if not fused or because is not None:
        if spec.train.cuda_graphs == "always":
            why = f"layers are plain: {because}" if fused else "kernels are plain here"
            raise ModelError(f"train.cuda_graphs {no_graphs(why)}")
        if spec.train.attention != "auto":
            why = f"those of this model are plain: {because}" if fused else "kernels are plain here"
            raise ModelError(
                f"train.attention {spec.train.attention} is a kernel of fused layers, and {why}; set it to auto"
            )
        return replace(common, plain_layers_because=because if fused else None)
    kernel = attention_kernel(spec, architecture)
    by_offsets = on_gpu and (
        spec.data.packing
        or spec.topology.context_parallel > 1
        or _is_windowed(architecture, spec.data.seq_length)
        or _has_sinks(architecture)
        or _is_capped(architecture)
    )
    by_kernel = by_offsets and (kernel == "flash4" or not _is_capped(architecture))
    if on_gpu and not by_kernel and spec.train.attention != "auto":
        raise ModelError(
            f"train.attention {kernel} would compute nothing: {_why_torchs(by_offsets=by_offsets)}; set it to auto"
        )
    broken = attention.broken_flash4() if by_kernel and spec.train.attention == "auto" else None
    text = f"{kernel} (flash-attn-4 cannot be imported: {broken})" if broken else kernel
    if architecture.shape.largest_head > LARGEST_FLASH_HEAD:
        text += f" (torch's for heads of {architecture.shape.largest_head})"
    graphs = _graphs(spec, architecture, on_gpu=on_gpu)
    return replace(common, attention=kernel, attention_text=text if by_kernel else "torch's", graphs=graphs)


def _why_torchs(*, by_offsets: bool) -> str:
    """Return why attention is computed by torch's own operations."""
    if by_offsets:
        return "this model's scores are capped, which only flash4 computes"
    return "rows are neither packed, nor shared by ranks, nor longer than a sliding window"


def _graphs(spec: RunSpec, architecture: Architecture, *, on_gpu: bool) -> bool:
    """Return what train.cuda_graphs means for fused layers, or raise ModelError if it cannot be."""
    because = no_graphs_because(spec, architecture.shape) if on_gpu else "there is no GPU here"
    if because is not None and spec.train.cuda_graphs == "always":
        raise ModelError(f"train.cuda_graphs {no_graphs(because)}")
    return on_gpu and uses_cuda_graphs(spec, architecture.shape)


def _precision(spec: RunSpec, architecture: Architecture) -> Iterator[str]:
    """Yield the precision of products and, with fp8, what of them is otherwise."""
    yield spec.train.precision
    if spec.train.precision != "fp8":
        return
    fp8 = spec.train.fp8
    if any(isinstance(layer.mlp, Experts) for layer in architecture.layers) and not fp8.experts:
        yield "those of experts in bf16"
    for place, layers in (("first", fp8.bf16_first_layers), ("last", fp8.bf16_last_layers)):
        if layers:
            yield f"those of the {place} {layers} layers in bf16"
    if fp8.gradients != "e4m3":
        yield f"gradients in {fp8.gradients}"
    if fp8.bf16_gradients:
        yield f"gradients of {' and '.join(fp8.bf16_gradients)} in bf16"
    yield f"evaluation in {'fp8' if fp8.evaluation else 'bf16'}"


def attention_kernel(spec: RunSpec, architecture: Architecture) -> attention.Kernel:
    """Return the kernel that train.attention means here, or raise ModelError if it cannot be used."""
    chosen, sizes = spec.train.attention, [kind.core_dim for kind in architecture.shape.head_kinds]
    if chosen == "flash4" and not attention.has_flash4():
        broken = attention.broken_flash4()
        why = f", which cannot be imported ({broken})" if broken else ""
        raise ModelError(
            f"train.attention flash4 needs the package flash-attn-4 in the ranks' Python{why}; set it to auto"
        )
    if chosen == "flash4" and not all(attention.flash4_takes(size) for size in sizes):
        raise ModelError(
            f"train.attention flash4 takes heads of 32, 64, 96 or 128; this model's are "
            f"{' and '.join(map(str, sizes))}, whose gradients it gets wrong on Hopper; set it to auto"
        )
    lacking = _without_gradients(architecture)
    if chosen == "flash4" and lacking is not None:
        raise ModelError(
            f"train.attention flash4: the installed flash-attn-4 has no gradients of {lacking}; install version "
            "4.0.0b36 or newer, or set it to auto"
        )
    if chosen == "auto":
        fastest = {attention.fastest_kernel(size) for size in sizes}
        return fastest.pop() if lacking is None and len(fastest) == 1 else "flash2"
    return chosen


def _without_gradients(architecture: Architecture) -> str | None:
    """Return what of this model's attention the installed flash-attn-4 computes forward alone, or None."""
    if _is_capped(architecture) and not attention.flash4_has_gradients_of("softcap"):
        return "scores that are capped by tanh, as all of this model's are"
    if _has_sinks(architecture) and not attention.flash4_has_gradients_of("learnable_sink"):
        return "this model's trained sinks"
    return None


def _linear_attention(
    spec: RunSpec, architecture: Architecture, *, on_gpu: bool
) -> tuple[gated_delta.Kernel, str | None]:
    """Return what train.linear_attention means here and what to call it, or raise ModelError if it cannot be used."""
    chosen = spec.train.linear_attention
    if architecture.shape.linear is None:
        return "torch", None
    if chosen == "torch":
        return "torch", "torch's"
    because = _no_fla_because(spec, on_gpu=on_gpu)
    if because is None:
        return "fla", "fla"
    if chosen == "fla":
        raise ModelError(f"train.linear_attention fla cannot be used: {because}; set it to auto")
    return "torch", f"torch's ({because})"


def _no_fla_because(spec: RunSpec, *, on_gpu: bool) -> str | None:
    if not on_gpu:
        return "fla needs a GPU"
    if spec.train.precision == "fp32":
        return "fla does not compute in fp32"
    if spec.train.deterministic and spec.train.linear_attention == "auto":
        return "train.deterministic"  # fla times its kernels as a run begins, and takes the fastest
    return gated_delta.fla_problem()


def _is_capped(architecture: Architecture) -> bool:
    return all(attention.score_softcap is not None for attention in architecture.attentions)


def _has_sinks(architecture: Architecture) -> bool:
    return any(attention.sinks for attention in architecture.attentions)


def _is_windowed(architecture: Architecture, length: int) -> bool:
    """Return whether some layer hides positions of rows of this length."""
    windows = (attention.window for attention in architecture.attentions)
    return any(window is not None and window < length for window in windows)


def _unfused_part(spec: RunSpec, architecture: Architecture) -> str | None:
    """Return what of the layers no fused kernel computes, or None."""
    # Fused norms are rounded late, those of all models.
    if architecture.norm not in ("rms", "late_rounded_rms", "zero_centered_rms"):
        return "norms other than RMSNorm"
    if architecture.rope is None:
        return "learned positions"
    if not all(layer.norm_before for layer in architecture.layers):
        return "no norms before attention and MLP"
    if any(isinstance(layer.mlp, Experts) and layer.mlp.beside_mlp for layer in architecture.layers):
        return "experts beside an MLP"
    if not all(_has_fused_mlp(layer.mlp) for layer in architecture.layers):
        return "MLPs other than SwiGLU and GeGLU without biases"
    return None if spec.model.hidden_dropout == 0 else "model.hidden_dropout"


def _has_fused_mlp(mlp: DenseMLP | Experts) -> bool:
    known = ("silu",) if isinstance(mlp, Experts) else ("silu", "gelu_tanh")
    if isinstance(mlp, Experts) and mlp.clamped is not None:
        return mlp.bias
    return mlp.gated and not mlp.bias and mlp.activation in known
