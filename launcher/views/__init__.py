"""What the commands print: states, logs, plans and reports of runs."""
