"""The common part of the adapters' `convert`, which replaces foreign layers of a network by ours."""
