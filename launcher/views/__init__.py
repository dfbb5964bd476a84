"""What runs there are and how they are: status, logs, reports."""
