"""What the command line runs: bench, plan, report, doctor."""
