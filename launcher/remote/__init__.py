"""Run commands on a cluster's login node, over the user's own ssh."""
