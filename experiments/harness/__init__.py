"""What every experiment shares: run folder, stages, command line, claims, figures, report."""
