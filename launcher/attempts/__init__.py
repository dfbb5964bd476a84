"""What happens in and after an attempt on the compute nodes: lease, cause, restart, notice."""
