"""Cluster files and the ledger of nodes to keep away from."""
