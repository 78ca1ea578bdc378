"""Adapting prepared models: parameters of chunk rules from queries, which layers stay full."""
