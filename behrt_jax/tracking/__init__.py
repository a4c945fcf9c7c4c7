"""What a run leaves behind: metrics, summary, plots, report."""
