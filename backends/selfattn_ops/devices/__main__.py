"""The devices that a framework sees, as JSON: {"kinds": {word: names}, "models": {name: model}}."""

import importlib
import json
import sys

if __name__ == "__main__":
    module = importlib.import_module(f"selfattn_ops.devices.{sys.argv[1]}")
    kinds = module.devices()
    models = {name: module.about(name)["model"] for names in kinds.values() for name in names}
    # What the framework prints may stand before it.
    sys.stdout.write("\n" + json.dumps({"kinds": kinds, "models": models}) + "\n")
