"""Print the devices that a framework finds, as JSON: {"kinds": {word: names}, "models": {name: model}}."""

import importlib
import json
import sys

if __name__ == "__main__":
    module = importlib.import_module(f"selfattn_ops.devices.{sys.argv[1]}")
    kinds = module.devices()
    models = {name: module.about(name)["model"] for names in kinds.values() for name in names}
    # The line break separates the JSON from anything that the framework has printed.
    sys.stdout.write("\n" + json.dumps({"kinds": kinds, "models": models}) + "\n")
