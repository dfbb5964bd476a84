"""What `launcher import` checks of a NeMo config before it prints it in our keys."""
