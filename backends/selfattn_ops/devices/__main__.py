"""The devices that a framework sees, as JSON: {name: model}."""

import importlib
import json
import sys

if __name__ == "__main__":
    module = importlib.import_module(f"selfattn_ops.devices.{sys.argv[1]}")
    names = dict.fromkeys(name for names in module.devices().values() for name in names)
    # What the framework prints may stand before it.
    sys.stdout.write("\n" + json.dumps({name: module.about(name)["model"] for name in names}) + "\n")
