"""`python -m selfattn_core.cli` is the `selfattn` command."""

from selfattn_core.cli import main

if __name__ == "__main__":
    main(prog_name="selfattn")
