"""From a checked config to exactly one job: script, bundle, secrets, submit, resubmit."""
