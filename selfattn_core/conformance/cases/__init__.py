"""The cases of the kit, and what they are run on."""
