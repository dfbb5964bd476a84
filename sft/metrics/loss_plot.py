"""Plot the loss curve."""

from __future__ import annotations

from launcher.contract.records import read_metrics
from launcher.contract.rundir import RunPaths


def plot_loss(paths: RunPaths) -> None:
    """Plot training and held-out loss from metrics.jsonl over steps, and save the plot as loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_metrics(paths)
    training = [(record["step"], record["loss"]) for record in records if "loss" in record]
    held_out = [(record["step"], record["eval_loss"]) for record in records if "eval_loss" in record]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if training:
        axes.plot(*zip(*training, strict=True), color="tab:blue", linewidth=1.2, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held-out")
    axes.set(title=paths.name, xlabel="step", ylabel="loss (nats per target token)")
    axes.grid(alpha=0.3)
    if training or held_out:
        axes.legend()
    partial = paths.loss_plot.with_suffix(".partial.png")
    figure.savefig(partial, dpi=120)
    pyplot.close(figure)
    partial.replace(paths.loss_plot)
