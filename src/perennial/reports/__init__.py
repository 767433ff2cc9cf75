"""What a run shows: one HTML page, its JSON, a comparison of runs, plots and videos."""
