"""Our layer in the place of foreign ones in a network: what the adapters' `convert` share."""
