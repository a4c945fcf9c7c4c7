"""The report of a run made again, or one page that compares several."""

from pathlib import Path
from tempfile import TemporaryDirectory

from behrt_jax.config.commands import ReportConfig
from behrt_jax.errors import InputError
from behrt_jax.run_folder import PLOTS_FOLDER
from behrt_jax.tracking.comparison import ComparedRun, read_runs, write_comparison
from behrt_jax.tracking.plots import plot_curves
from behrt_jax.tracking.report import write_report


def report(config: ReportConfig) -> Path:
    """Write the page that the runs ask for; returns its path. No model is read, and no JAX is needed.

    Raises:
        InputError: no run is named, one holds no run, or the output is no HTML file.
    """
    if not config.runs:
        raise InputError("no run is named: give the --output of pretrain or finetune, one or several.")
    output = config.output
    if output is not None and output.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--output is {output}: give a file that ends with .html.")
    runs = read_runs(config.runs)
    with TemporaryDirectory() as scratch:
        if len(runs) > 1:
            output = output or Path("comparison.html").absolute()
            write_comparison(runs, Path(scratch), output)
        else:
            # The run's own pictures are made anew with its report; with another output it stays as it is.
            plots = Path(scratch) if output else config.runs[0] / PLOTS_FOLDER
            _draw(runs[0], plots)
            output = write_report(config.runs[0], plots, output)
    print(f"Written to {output}")
    return output


def _draw(run: ComparedRun, plots: Path) -> None:
    baselines = run.summary.get("baselines") or run.config.get("baselines") or {}
    members = [member["member"] for member in run.summary.get("members") or ()]
    plot_curves(run.metrics, baselines, plots, members)
